"""One stream for all readers: whoever merges what comes sees what is."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.dashboard.feed import QUIET_S, RING, Feed, Message
from swarm.dashboard.schemas import Delta, Snapshot
from tests.helpers.crowd import Crowd

T0 = 1_750_000_000.0


class Reader:
    """Merges messages as a page does."""

    def __init__(self) -> None:
        self.last_id = ""
        self.peers: dict[str, dict[str, Any]] = {}
        self.models: dict[str, Any] = {}
        self.events: list[int] = []
        self.totals: Any = None

    def take(self, feed: Feed) -> list[Message]:
        messages = feed.after(self.last_id)
        for message in messages:
            self.merge(message)
        return messages

    def merge(self, message: Message) -> None:
        said = json.loads(message.data)
        self.last_id, self.totals = message.id, said["totals"]
        if message.kind == "snapshot":
            Snapshot.model_validate(said)
            self.peers = {row["peer_id"]: row for row in said["peers"]}
            self.models = {view["model_id"]: view for view in said["models"]}
            self.events = [event["id"] for event in reversed(said["events"])]
            return
        Delta.model_validate(said)
        for patch in said["peers"]:
            self.peers[patch["peer_id"]] = self.peers.get(patch["peer_id"], {}) | patch
        for peer in said["forgotten"]:
            del self.peers[peer]
        self.models |= {view["model_id"]: view for view in said["models"]}
        for model in said["models_gone"]:
            del self.models[model]
        self.events += [event["id"] for event in said["events"]]


@settings(max_examples=15)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=25))
def test_readers_that_come_pause_and_return_see_the_same_as_a_new_one(
    seed: int, seconds: list[tuple[int, bool]]
) -> None:
    crowd = Crowd(12, seed=seed, now_s=T0)
    steady, lazy = Reader(), Reader()
    now_s = T0
    for churn, read in seconds:
        now_s += 5.0
        crowd.second(now_s, churn=churn)
        steady.take(crowd.feed)
        if read:
            lazy.take(crowd.feed)
    new = Reader()
    for reader in (steady, lazy, new):
        reader.take(crowd.feed)
        assert reader.take(crowd.feed) == [], "nothing twice"
    for reader in (steady, lazy):
        assert (reader.peers, reader.models, reader.totals) == (new.peers, new.models, new.totals)
        assert reader.events[-len(new.events) :] == new.events or not new.events
    rows = {row.peer_id: row.state.value for row in crowd.core.rows()}
    assert {peer: row["state"] for peer, row in new.peers.items()} == rows


def test_a_reader_that_was_away_for_long_gets_everything_anew_and_no_id_is_trusted() -> None:
    crowd = Crowd(5, now_s=T0)
    first = crowd.feed.snapshot()
    assert crowd.feed.after(first.id) == []
    for second in range(1, RING + 2):
        crowd.second(T0 + second)
    assert [message.kind for message in crowd.feed.after(first.id)] == ["snapshot"]
    for strange in ("", "crowd0-", "crowd0-999999", "other-1", "crowd0--1", "crowd0-1e3", "-", "crowd0-" + "9" * 50):
        assert [message.kind for message in crowd.feed.after(strange)] == ["snapshot"], strange
    last = crowd.feed.snapshot().id
    crowd.second(T0 + RING + 2)
    assert [message.kind for message in crowd.feed.after(last)] == ["delta"]


def test_a_quiet_swarm_is_said_to_be_quiet_now_and_then() -> None:
    crowd = Crowd(3, now_s=T0)
    told = [crowd.feed.tick(T0 + second) for second in range(1, 25)]
    assert told.count(True) == 24 // QUIET_S
    (message,) = crowd.feed.after(f"crowd0-{int(crowd.feed.snapshot().id.split('-')[1]) - 1}")
    assert Delta.model_validate_json(message.data).peers == []


def test_a_small_change_is_a_small_message() -> None:
    crowd = Crowd(300, now_s=T0)
    before = crowd.feed.snapshot()
    peer = next(iter(crowd.members))
    crowd.core.silent(peer, "gone", T0 + 1)
    crowd.publish(T0 + 1)
    (message,) = crowd.feed.after(before.id)
    said = Delta.model_validate_json(message.data)
    assert [patch.model_dump() for patch in said.peers] == [{"peer_id": peer, "problem": "gone"}]
    assert len(message.data) < len(before.data) / 20
