"""The JSON, the stream, the badge and the limits, by HTTP against a real server over simulated peers."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from routing.invites import parse
from swarm.dashboard import app as module
from swarm.dashboard import badge
from swarm.dashboard.app import ASKS_PER_MINUTE, Asks
from swarm.dashboard.join import join
from swarm.dashboard.schemas import Delta, PeerDetail, Snapshot
from swarm.web.server import is_exposed
from tests.helpers.crowd import ENTRY, HOSTILE, MODEL, OTHER_MODEL, Crowd, CrowdServer, serving

T0 = 1_750_000_000.0
NAME = "crowd-8b-instruct"


@pytest.fixture(scope="module")
def server() -> Iterator[CrowdServer]:
    with serving(200) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: CrowdServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def get(http: httpx2.Client, path: str, **query: Any) -> Any:
    answer = http.get(f"/api/v1/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- answers ---


def test_every_answer_is_as_its_schema_says(http: httpx2.Client) -> None:
    description = http.get("/openapi.json").json()
    peer = get(http, "peers", limit=1)["peers"][0]["peer_id"]
    known = {"{peer_id}": peer, "{model}": NAME}
    checked = 0
    for path, operations in description["paths"].items():
        content = operations.get("get", {}).get("responses", {}).get("200", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if schema is None:
            continue
        for name, value in known.items():
            path = path.replace(name, value)
        schema = schema | {"components": description["components"]}
        jsonschema_rs.Draft202012Validator(schema).validate(http.get(path).json())
        checked += 1
    assert checked == 10


def test_peers_are_filtered_searched_and_paged(http: httpx2.Client) -> None:
    everybody = get(http, "peers", limit=1000)
    assert everybody["total"] == len(everybody["peers"]) == 200
    pages = [get(http, "peers", offset=at, limit=70)["peers"] for at in (0, 70, 140, 210)]
    assert [row["peer_id"] for page in pages for row in page] == [row["peer_id"] for row in everybody["peers"]]
    assert {row["model_id"] for row in get(http, "peers", model=NAME)["peers"]} == {MODEL.hex}
    assert get(http, "peers", model=OTHER_MODEL.hex[:8])["total"] == 20
    assert get(http, "peers", state=["lost", "left"])["total"] == 0
    assert get(http, "peers", q="<SCRIPT>")["total"] > 0
    row = everybody["peers"][5]
    assert [found["peer_id"] for found in get(http, "peers", q=row["peer_id"][-9:].lower())["peers"]] == [
        row["peer_id"]
    ]


def test_a_peers_page_has_everything(http: httpx2.Client) -> None:
    rows = [row for row in get(http, "peers", limit=200)["peers"] if row["status_at_s"] is not None]
    details = [PeerDetail.model_validate(get(http, f"peers/{row['peer_id']}")) for row in rows[:40]]
    assert all(detail.status is not None and detail.addresses for detail in details)
    assert any(detail.round_trips for detail in details)
    assert {detail.uplink_bytes_per_s for detail in details} == {None, 2**20, 2**21}
    assert {detail.relayed for detail in details} == {True, False}
    assert http.get("/api/v1/peers/12D3nobody").status_code == 404


def test_a_model_is_asked_for_by_name_and_what_is_not_there_is_a_clear_error(http: httpx2.Client) -> None:
    route = get(http, f"models/{NAME}/route")
    assert (route["hops"][0]["span"][0], route["hops"][-1]["span"][1]) == (0, 32)
    broken = http.get("/api/v1/models/<b>other<%2Fb>%2Fmodel & co/route")
    assert (broken.status_code, broken.json()["error"][:8]) == (503, "no route")
    for path in ("models/none/route", "topology?model=none", "history?model=none", "peers?model=none"):
        answer = http.get(f"/api/v1/{path}")
        assert (answer.status_code, answer.json()["error"]) == (404, "nobody announces a model 'none'")
    for path in ("peers?limit=0", "history?hours=1e9", "events?kind=party", "peers?offset=-1", "history?points=x"):
        answer = http.get(f"/api/v1/{path}")
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(path.partition("?")[2].partition("=")[0])
    topology = get(http, "topology", model=NAME)
    nodes = {node["peer_id"] for node in topology["nodes"]}
    assert len(nodes) == 180
    assert all({link["a"] or topology["route"][0], link["b"]} <= nodes for link in topology["links"])
    assert topology["route"] == [hop["peer_id"] for hop in get(http, "overview")["models"][0]["route"]]


def test_events_are_told_and_kept(server: CrowdServer, http: httpx2.Client) -> None:
    (peer,) = server.do("leave")
    server.do("kill")
    (event,) = get(http, "events", peer=peer)["events"]
    assert (event["kind"], event["peer_id"]) == ("left", peer)
    assert get(http, "events", kind="left", q=peer[-8:])["events"] == [event]
    page = get(http, "events", limit=1)
    assert page["more"] == (len(get(http, "events")["events"]) > 1)
    assert get(http, "history", hours=0.1)["points"][-1]["online"] > 0
    assert [row["state"] for row in get(http, "peers", state="left")["peers"]] == ["left"]


def test_nothing_loads_from_elsewhere_and_nobody_frames_it(http: httpx2.Client) -> None:
    for path in ("/", "/api/v1/overview", "/nothing", "/api/v1/badge.svg"):
        policy = http.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
    page = http.get("/docs")
    assert "https://" not in page.text
    assert "http" not in page.headers["content-security-policy"]


def test_health_and_metrics_speak_of_the_view(http: httpx2.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    text = http.get("/metrics").text
    assert f'hiveswarm_dashboard_peers{{model="{NAME}",model_id="{MODEL.hex[:12]}",state="online"}}' in text
    assert 'model="<b>other</b>/model & co"' in text
    assert "hiveswarm_dashboard_replication" in text


# --- the stream ---


def read(http: httpx2.Client, count: int, **options: Any) -> list[tuple[str, str, Any]]:
    """(id, kind, data) of the first messages."""
    found, fields = [], dict[str, str]()
    with http.stream("GET", "/api/v1/stream", **options) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if not line and fields:
                found.append((fields["id"], fields["event"], json.loads(fields["data"])))
                fields = {}
                if len(found) == count:
                    return found
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                fields[name] = value
    return found


def test_a_stream_begins_with_everything_and_resumes_where_it_was(server: CrowdServer, http: httpx2.Client) -> None:
    (first_id, kind, snapshot), (second_id, delta_kind, delta) = read(http, 2)
    assert (kind, delta_kind) == ("snapshot", "delta")
    Snapshot.model_validate(snapshot)
    Delta.model_validate(delta)
    (peer,) = server.do("kill")
    for options in ({"headers": {"Last-Event-ID": first_id}}, {"params": {"last_event_id": first_id}}):
        resumed = read(http, 2, **options)
        assert resumed[0][:2] == (second_id, "delta")
        assert all(each[1] == "delta" for each in resumed)
    missed = read(http, 1, headers={"Last-Event-ID": second_id})
    while peer not in [patch["peer_id"] for patch in missed[-1][2]["peers"]]:
        missed += read(http, 1, headers={"Last-Event-ID": missed[-1][0]})
    assert read(http, 1, headers={"Last-Event-ID": "of-another-process-7"})[0][1] == "snapshot"


def test_readers_are_bounded_and_let_go_of(
    server: CrowdServer, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    eventually_without_readers(server)
    monkeypatch.setattr(module, "MAX_READERS", 1)
    with http.stream("GET", "/api/v1/stream") as stream:
        lines = stream.iter_lines()  # whose end closes the stream
        next(lines)
        refused = http.get("/api/v1/stream")
        assert (refused.status_code, refused.json()["error"]) == (503, "too many readers")
        assert "retry-after" in refused.headers
        del lines
    eventually_without_readers(server)


def eventually_without_readers(server: CrowdServer) -> None:
    """The server hears of a reader's end when it next looks."""
    server.wait(lambda: server.dashboard.readers == 0)


# --- what dials ---


def test_who_asks_whether_a_peer_is_reachable_hears_what_is_wrong(server: CrowdServer, http: httpx2.Client) -> None:
    peer = get(http, "peers", limit=1)["peers"][0]["peer_id"]
    answer = http.post("/api/v1/reachability", json={"address": f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["reachable"], said["peer_id"]) == (False, peer)
    assert [check["ok"] for check in said["checks"]] == [True, False, False]
    assert "refused" in said["checks"][1]["detail"]
    assert "nothing listens there" in said["hint"]
    assert said["checks"][0]["detail"].endswith("1 address")
    named = http.post("/api/v1/reachability", json={"address": f"/dns4/nobody.invalid/tcp/1/p2p/{peer}"}).json()
    assert (named["reachable"], named["hint"][:19]) == (False, "does that name lead")
    for body in ({}, {"peer_id": peer, "address": "x"}, {"address": "/unix/tmp/x"}, {"address": "/ip4/1.2.3.4/tcp/80"},
                 {"peer_id": "x" * 500}, {"peer": peer}):  # fmt: skip
        assert http.post("/api/v1/reachability", json=body).status_code == 400, body
    assert http.post("/api/v1/reachability", json={"peer_id": "12D3nobody"}).status_code == 404
    assert http.post("/api/v1/reachability", content=b"x" * 5000).status_code == 413
    server.dashboard.exposed = True
    private = http.post("/api/v1/reachability", json={"address": f"/ip4/127.0.0.1/tcp/22/p2p/{peer}"})
    assert private.status_code == 400
    assert "public addresses" in private.json()["error"]
    server.dashboard.exposed = False


def test_dials_are_few(server: CrowdServer, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(Asks):
        """However long they take."""

        def wait_s(self, asker: str, now_s: float) -> float:
            return super().wait_s(asker, T0)

    monkeypatch.setattr(server.dashboard, "asks", AtOnce())
    peer = get(http, "peers", limit=1)["peers"][0]["peer_id"]
    answers = [
        http.post("/api/v1/reachability", json={"address": f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"})
        for _ in range(ASKS_PER_MINUTE + 1)
    ]
    assert [answer.status_code for answer in answers] == [200] * ASKS_PER_MINUTE + [429]
    assert int(answers[-1].headers["retry-after"]) >= 1


def test_a_minutes_asks_may_come_at_once_and_no_more() -> None:
    asks = Asks()
    assert [asks.wait_s("a", T0) for _ in range(ASKS_PER_MINUTE)] == [0.0] * ASKS_PER_MINUTE
    wait_s = asks.wait_s("a", T0)
    assert 0 < wait_s <= 60 / ASKS_PER_MINUTE
    assert asks.wait_s("b", T0) == 0.0
    assert asks.wait_s("a", T0 + wait_s) == 0.0
    for number in range(2000):
        asks.wait_s(str(number), T0)
    assert len(asks._buckets) <= module.MAX_ASKERS


def test_only_loopback_is_private() -> None:
    assert [is_exposed(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.0.2.1")] == [
        False, False, False, True, True, True,
    ]  # fmt: skip


# --- what others embed and paste ---


@pytest.mark.parametrize("name", [*HOSTILE, "]]>", "&lt;", "\ud7ff\ue000"])
def test_a_badge_is_well_formed_whatever_a_model_is_called(name: str) -> None:
    view = Crowd(5, now_s=T0).core.models[0].model_copy(update={"name": name})
    for drawn in (badge.of_model(view, name), badge.of_model(None, name)):
        root = ET.fromstring(drawn)
        assert {element.tag.rpartition("}")[2] for element in root.iter()} == {"svg", "clipPath", "rect", "g", "text"}
        assert root.findall(".//{*}text")[0].text == name[:40] or not name


def test_a_badge_says_in_words_how_the_swarm_is(http: httpx2.Client) -> None:
    def words(drawn: str) -> str:
        return ET.fromstring(drawn).get("aria-label") or ""

    healthy = http.get("/api/v1/badge.svg", params={"model": NAME})
    assert healthy.headers["content-type"] == "image/svg+xml"
    assert words(healthy.text).startswith(f"{NAME}: healthy ×")
    assert words(http.get("/api/v1/badge.svg?model=none").text) == "none: unknown"
    assert "2 of 2" not in words(http.get("/api/v1/badge.svg").text)
    crowd = Crowd(50, now_s=T0)
    crowd.gap(T0 + 1)
    crowd.look(T0 + 1)
    crowd.core.advance(T0 + 1)
    assert "blocks missing" in words(badge.of_model(crowd.core.models[0], NAME))
    assert "healthy" in words(badge.of_swarm(crowd.core.overview(T0)))
    crowd.core.failed("deaf")
    assert words(badge.of_swarm(crowd.core.overview(T0))) == "swarm: not visible now"


def test_a_command_to_join_is_safe_to_paste_whatever_a_model_is_called(http: httpx2.Client) -> None:
    said = get(http, "join")
    assert parse(said["invite"]).bootstraps == (ENTRY,)
    assert said["note"] == ""
    (plain,) = (each["command"] for each in said["commands"] if each["model_id"] == MODEL.hex)
    assert shlex.split(plain) == ["swarm", "join", NAME, "--invite", said["invite"]]
    view = Crowd(5, now_s=T0).core.models[0]
    for name in (*HOSTILE, "-rf", "--new-swarm", "a b", "a;b", "$(x)", "a\u00e9"):
        (command,) = join("crowd", (ENTRY,), [view.model_copy(update={"name": name})]).commands
        assert shlex.split(command.command) in (
            ["swarm", "join", "MODEL", "--invite", said["invite"]],
            ["swarm", "join", "W" * 48, "--invite", said["invite"]],
        )
    local = join("crowd", (ENTRY.replace("1.1.1.1", "127.0.0.1"),), [])
    assert "no public IP address" in local.note
