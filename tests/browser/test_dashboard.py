"""The dashboard's pages in a real browser: a thousand simulated peers, some of evil names, behind the real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers.accessibility import violations, violations_in_both_themes
from tests.helpers.browser import chromium, visit
from tests.helpers.crowd import ADAPTERS, HOSTILE, CrowdServer, serving

PEERS = 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def crowd(browser: Browser) -> Iterator[CrowdServer]:
    with serving(PEERS) as crowd:
        yield crowd


@pytest.fixture
def page(browser: Browser, crowd: CrowdServer) -> Iterator[Page]:
    with visit(browser, crowd.url) as page:
        expect(page.locator(".fresh")).to_contain_text("live")
        yield page


def ask(crowd: CrowdServer, path: str) -> Any:
    return httpx2.get(f"{crowd.url}/api/v1/{path}", timeout=60).raise_for_status().json()


def go(page: Page, title: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=title).click()


def test_every_page_shows_what_strangers_wrote_and_obeys_none_of_it(page: Page, crowd: CrowdServer) -> None:
    """At 1,280 and 390 pixels: nothing is wider than the screen, no element comes from a name, nothing runs."""
    rows = ask(crowd, "peers?limit=1000")["peers"]
    evil = next(row for row in rows if row["name"] == HOSTILE[0])
    detail = f"{crowd.url}/#/peers/{evil['peer_id']}"
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        go(page, "Overview")
        expect(page.get_by_role("listitem", name="Block 0:", exact=False)).to_be_visible()
        expect(page.get_by_text("<b>other</b>/model & co").first).to_be_attached()
        go(page, "Peers")
        page.get_by_placeholder("Name or id").fill("<script>")
        expect(page.get_by_text(HOSTILE[0]).first).to_be_visible()
        page.get_by_placeholder("Name or id").fill("")
        go(page, "Topology")
        expect(page.locator("#topology")).to_be_visible()
        page.get_by_role("button", name="By distance").click()
        go(page, "Events")
        go(page, "Join")
        expect(page.get_by_label("the invite", exact=True)).to_contain_text("swarm://")
        page.goto(detail)
        expect(page.get_by_role("heading", name=HOSTILE[0])).to_be_visible()
        expect(page.get_by_text("cuda:0<script>")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#app :is(script, img[src=x], svg[onload], b, i, u)").count() == 0
    assert page.title() == "Peers – hiveswarm"


def test_every_page_is_for_everybody(browser: Browser) -> None:
    """Nothing that axe-core knows to be against WCAG 2 A or AA, dark and light; and narrow, with the same colours."""
    with serving(20) as crowd, visit(browser, crowd.url) as page:
        for happens in ("leave", "kill", "join", "move", "gap"):
            crowd.do(happens)
        one = ask(crowd, "peers?limit=1")["peers"][0]["peer_id"]
        found = list[str]()
        for width, look in ((1280, violations_in_both_themes), (390, violations)):
            page.set_viewport_size({"width": width, "height": 800})
            for path, there in (
                ("", page.get_by_text("Nobody holds blocks")),
                ("peers", page.locator(".body .row").first),
                ("topology", page.locator("#topology")),
                ("events", page.locator(".event").first),
                ("join", page.get_by_label("the invite", exact=True)),
                (f"peers/{one}", page.get_by_role("heading", name="Time per block")),
            ):
                page.goto(f"{crowd.url}/#/{path}")
                expect(there).to_be_visible()
                found += look(page)
        assert found == []


def test_a_thousand_peers_are_a_table_of_what_is_in_sight(page: Page, crowd: CrowdServer) -> None:
    go(page, "Peers")
    table = page.get_by_role("table", name="Peers")
    rows = table.locator(".body .row")
    expect(page.get_by_text(f"{PEERS:,} peers")).to_be_visible()
    assert rows.count() < 60
    page.get_by_role("columnheader", name="Per block").get_by_role("button").click()
    fastest = sorted(ask(crowd, f"peers?limit={PEERS}")["peers"], key=lambda row: row["decode_s_per_block"])
    expect(rows.first).to_contain_text(fastest[0]["peer_id"][-8:])
    page.locator("#peer-rows").evaluate("(body) => body.scrollTo(0, 1e9)")
    expect(rows.last).to_contain_text(fastest[-1]["peer_id"][-8:])
    expect(rows.last).to_have_attribute("aria-rowindex", str(PEERS + 1))
    assert rows.count() < 60
    page.get_by_placeholder("Name or id").fill("peer-77")
    expect(rows).to_have_count(sum("peer-77" in row["name"] for row in fastest))
    rows.first.get_by_role("link").click()
    expect(page.get_by_role("heading", name="Time per block")).to_be_visible()


def test_what_happens_is_seen_as_it_happens(page: Page, crowd: CrowdServer) -> None:
    (gone,) = crowd.do("leave")
    page.goto(f"{crowd.url}/#/peers/{gone}")
    expect(page.locator(".peer-head")).to_contain_text("left")
    go(page, "Events")
    page.get_by_role("button", name="left", exact=True).click()
    expect(page.locator(".event").first).to_contain_text(gone[-6:])
    page.get_by_placeholder("Words or id").fill("no such words")
    expect(page.get_by_role("heading", name="Nothing like this")).to_be_visible()
    crowd.do("gap")
    go(page, "Overview")
    block = page.get_by_role("listitem", name="Block 31: nobody, a gap")
    expect(block).to_be_visible()
    expect(page.get_by_text("Nobody holds blocks")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text("31")  # read out, too
    (new,) = crowd.do("join")
    go(page, "Peers")
    page.get_by_placeholder("Name or id").fill(new)
    expect(page.locator(".body .row")).to_have_count(1)


def test_adapters_are_listed_with_their_hosts_and_what_nobody_hosts(browser: Browser) -> None:
    with serving(200) as crowd, visit(browser, crowd.url) as page:
        card = page.locator("section", has=page.get_by_role("heading", name="Adapters"))
        row = card.get_by_role("listitem").filter(has_text="pirate@")
        (told,) = (each for each in ask(crowd, "overview")["models"][0]["adapters"] if each["name"] == "pirate")
        expect(row).to_contain_text("complete")
        expect(row).to_contain_text(f"pirate@{told['digest']}")
        expect(row).to_contain_text(f"{told['hosts']} hosts")
        hosting = next(each for each in crowd.crowd.members.values() if len(each.record.adapters) == len(ADAPTERS))
        page.goto(f"{crowd.url}/#/peers/{hosting.record.peer_id}")
        expect(page.get_by_text(", ".join(map(str, ADAPTERS)))).to_be_visible()
        go(page, "Overview")
        crowd.do("gap")
        expect(row).to_contain_text("gaps")
        expect(row).to_contain_text("none for blocks")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_map_opens_peers_with_mouse_and_keys(page: Page, crowd: CrowdServer) -> None:
    page.get_by_label("Model").select_option("<b>other</b>/model & co")
    go(page, "Topology")
    canvas = page.locator("#topology")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#picture-now")).not_to_be_empty()
    chosen = page.locator(".chosen a").first
    href = chosen.get_attribute("href")
    chosen.click()
    assert page.url.endswith(str(href))
    expect(page.get_by_text("of 32")).to_be_visible()


def test_the_map_has_a_place_for_every_peer(page: Page) -> None:
    """Also where thousands would cover one another: then several share a place."""
    for peers, width in ((1, 300), (80, 1100), (3000, 360)):
        found = page.evaluate(
            """async ([count, width]) => {
                const { byBlocks, byDistance } = await import("./assets/dashboard/layout.js");
                const rows = Array.from({ length: count }, (_, at) => ({
                    peer_id: `peer ${at}`, spans: [[(at * 7) % 50, ((at * 7) % 50) + 1 + (at % 14)]],
                }));
                const at = new Map(rows.map(({ peer_id }, at) => [peer_id, at % 9 ? [(at % 5) / 100, 0] : null]));
                const views = [byBlocks(rows, 64, width), byDistance(rows, at, width, 400)];
                return views.map(({ items }) => ({
                    peers: items.flatMap((item) => item.peers.map((peer) => peer.peer_id)),
                    items: items.length,
                    inside: items.every(({ x, w }) => x >= 0 && x + w <= width),
                }));
            }""",
            [peers, width],
        )
        for view in found:
            assert sorted(view["peers"]) == sorted(f"peer {at}" for at in range(peers))
            assert view["inside"]
            assert view["items"] <= 90


def test_a_page_survives_the_restart_of_its_dashboard(browser: Browser) -> None:
    """It says that it reconnects, shows what it knew meanwhile, and is live again by itself, with another's view."""
    with ExitStack() as visiting:
        with serving(20, seed=1) as crowd:
            page = visiting.enter_context(visit(browser, crowd.url, width=390, refused=True))
            expect(page.locator(".fresh")).to_have_text("●live")
            go(page, "Peers")
            expect(page.get_by_text("20 peers")).to_be_visible()
        expect(page.locator(".fresh")).to_contain_text("reconnecting, last heard at")
        expect(page.get_by_text("20 peers")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        with serving(30, seed=2, port=int(crowd.url.rpartition(":")[2])) as crowd:
            expect(page.locator(".fresh")).to_have_text("●live")
            expect(page.get_by_text("30 peers")).to_be_visible()
            (new,) = crowd.do("join")
            page.get_by_placeholder("Name or id").fill(new)
            expect(page.locator(".body .row")).to_have_count(1)
