"""What others read of a peer while it joins, serves, moves and leaves."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from peers.host.presence import Presence
from routing.ids import BlockSpan, BlockSpans
from routing.records import Announcement, PeerState
from tests.peers.serving.test_announce import KEY, Shelf
from tests.peers.transport.nodes import announcement

SPANS = BlockSpans.of(BlockSpan(0, 1))


def presence(shelf: Shelf) -> Presence:
    def momentary(offered: Announcement) -> Announcement:
        return replace(offered, sessions=7)

    made = Presence(shelf, KEY, network="n", momentary=momentary)
    made.offer(announcement(KEY))
    return made


def test_what_changes_at_every_moment_is_asked_for_each_time_and_the_state_is_its_own() -> None:
    peer = presence(Shelf())
    said = peer.describe()
    assert (said.state, said.sessions, said.intent) == (PeerState.JOINING, 7, None)
    assert said.spans == announcement(KEY).spans
    for paused, state in ((True, PeerState.PAUSED), (False, PeerState.ONLINE)):
        peer.serve(paused=paused)
        assert peer.describe().state is state


async def test_an_intent_is_told_at_once_and_is_over_when_other_blocks_are_joined() -> None:
    shelf = Shelf()
    peer = presence(shelf)
    peer.serve(paused=False)
    assert await peer.intend(SPANS.parts[0])
    assert shelf.records
    assert peer.heard.is_set()
    assert peer.describe().intent == SPANS.parts[0]
    peer.join(SPANS)
    said = peer.describe()
    assert (said.state, said.intent, said.spans) == (PeerState.JOINING, None, SPANS)


async def test_whoever_leaves_says_so_and_leaves_also_where_nobody_hears_it(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    shelf.accepts = False
    peer = presence(shelf)
    with caplog.at_level(logging.INFO):
        assert not await peer.intend(SPANS.parts[0])
        await peer.leave()
    assert peer.describe().state is PeerState.DRAINING
    assert "nobody could be told that this peer leaves" in caplog.text
