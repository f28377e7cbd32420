"""A peer's records: under both keys, newer every time, whatever its clock does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from peers.serving.announce import PUT_TIMEOUT_S, Announcer
from routing.errors import Unavailable
from routing.records import RECORD_LIFETIME_S, RECORD_RENEW_S, Announcement, index_key, model_key, verify_record
from routing.store import StoredRecord
from tests.peers.transport.nodes import MODEL, announcement, signing_key

pytestmark = pytest.mark.looptime

KEY = signing_key(1)


class Shelf:
    """A store that keeps all that was put, or does not answer."""

    def __init__(self) -> None:
        self.records: list[StoredRecord] = []
        self.accepts = True
        self.answers = True

    async def put(self, record: StoredRecord) -> None:
        if not self.answers:
            await asyncio.Event().wait()
        self.records.append(record)
        if not self.accepts:
            raise Unavailable("no node accepted it")

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        return [record for record in self.records if record.key in keys]


class Peer:
    def __init__(self) -> None:
        self.shelf = Shelf()
        self.outages: list[str | None] = []
        self.skew_s = 1_750_000_000.0
        self.announcer = Announcer(
            self.shelf, KEY, network="n", describe=self.describe, outage=self.outage, clock=self.now_s
        )

    def now_s(self) -> float:
        return self.skew_s + asyncio.get_running_loop().time()

    def outage(self, problem: Unavailable | None) -> None:
        self.outages.append(problem and str(problem))

    @staticmethod
    def describe(sequence: int, expires_at_s: float) -> Announcement:
        return replace(announcement(KEY), sequence=sequence, expires_at_s=expires_at_s)

    def read(self) -> list[Announcement]:
        return [
            verify_record(r.value, key=r.key, subkey=r.subkey, stored_expiry_s=r.expires_at_s, now_s=self.now_s())
            for r in self.shelf.records
        ]


async def test_an_announcement_stands_under_its_models_key_and_in_the_index() -> None:
    peer = Peer()
    await peer.announcer.announce()
    assert [record.key for record in peer.shelf.records] == [
        model_key("n", MODEL, KEY.peer_id),
        index_key("n", KEY.peer_id),
    ]
    one, other = peer.read()
    assert one == other
    assert one.expires_at_s == pytest.approx(peer.now_s() + RECORD_LIFETIME_S)


async def test_the_sequence_grows_also_while_the_clock_stands_still_or_is_set_back() -> None:
    peer = Peer()
    for step_s in (0.0, 0.0, -2.0, 5.0):
        peer.skew_s += step_s
        await peer.announcer.announce()
    sequences = [announcement.sequence for announcement in peer.read()[::2]]
    assert sequences == sorted(set(sequences))


async def test_records_are_renewed_and_each_outage_is_told_once_with_its_end() -> None:
    peer = Peer()
    running = asyncio.create_task(peer.announcer.run())
    await asyncio.sleep(3.5 * RECORD_RENEW_S)
    assert (len(peer.shelf.records), peer.outages) == (8, [])
    peer.shelf.accepts = False
    await asyncio.sleep(3 * RECORD_RENEW_S)
    assert peer.outages == ["no node accepted it"]
    peer.shelf.answers = False
    await asyncio.sleep(2 * (RECORD_RENEW_S + PUT_TIMEOUT_S))
    assert peer.outages == ["no node accepted it"]
    peer.shelf.accepts = peer.shelf.answers = True
    await asyncio.sleep(2 * (RECORD_RENEW_S + PUT_TIMEOUT_S))
    assert peer.outages == ["no node accepted it", None]
    running.cancel()
    await asyncio.wait([running])
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_change_is_announced_at_once_also_one_that_comes_while_the_store_is_slow() -> None:
    peer = Peer()
    running = asyncio.create_task(peer.announcer.run())
    await asyncio.sleep(1.0)
    peer.announcer.soon()
    await asyncio.sleep(0.01)
    assert len(peer.shelf.records) == 4
    peer.shelf.answers = False
    peer.announcer.soon()
    await asyncio.sleep(1.0)
    peer.announcer.soon()  # while the announcement before is still under way
    peer.shelf.answers = True
    await asyncio.sleep(PUT_TIMEOUT_S)
    assert len(peer.shelf.records) >= 6
    running.cancel()
    await asyncio.wait([running])


async def test_a_peer_counts_as_heard_only_once_others_have_taken_its_record() -> None:
    peer = Peer()
    peer.shelf.answers = False
    running = asyncio.create_task(peer.announcer.run())
    await asyncio.sleep(PUT_TIMEOUT_S + 1)
    assert peer.outages == ["the DHT did not take this peer's record within 10 s"]
    peer.shelf.answers, peer.shelf.accepts = True, False
    await asyncio.sleep(2 * RECORD_RENEW_S)
    assert not peer.announcer.heard.is_set()
    peer.shelf.accepts = True
    await asyncio.wait_for(peer.announcer.heard.wait(), RECORD_RENEW_S)
    await asyncio.sleep(0)
    assert peer.outages[1:] == [None]
    running.cancel()
    await asyncio.wait([running])
