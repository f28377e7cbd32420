"""A peer's records: under both keys, newer every time, whatever its clock does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from peers.serving.announce import PUT_TIMEOUT_S, Announcer
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

    async def put(self, record: StoredRecord) -> bool:
        if not self.answers:
            await asyncio.Event().wait()
        self.records.append(record)
        return self.accepts

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        return [record for record in self.records if record.key in keys]


class Peer:
    def __init__(self) -> None:
        self.shelf = Shelf()
        self.unheard = 0
        self.skew_s = 1_750_000_000.0
        self.announcer = Announcer(
            self.shelf, KEY, network="n", describe=self.describe, unheard=self.nobody, clock=self.now_s
        )

    def now_s(self) -> float:
        return self.skew_s + asyncio.get_running_loop().time()

    def nobody(self) -> None:
        self.unheard += 1

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
    assert await peer.announcer.announce()
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


async def test_records_are_renewed_and_the_host_hears_when_nobody_took_one() -> None:
    peer = Peer()
    running = asyncio.create_task(peer.announcer.run())
    await asyncio.sleep(3.5 * RECORD_RENEW_S)
    assert (len(peer.shelf.records), peer.unheard) == (8, 0)
    peer.shelf.accepts = False
    await asyncio.sleep(RECORD_RENEW_S)
    assert peer.unheard == 1
    peer.shelf.answers = False
    await asyncio.sleep(RECORD_RENEW_S + PUT_TIMEOUT_S)
    assert peer.unheard == 2
    peer.shelf.accepts = peer.shelf.answers = True
    await asyncio.sleep(2 * RECORD_RENEW_S)
    assert (peer.unheard, len(peer.shelf.records) > 10) == (2, True)
    running.cancel()
    await asyncio.wait([running])
    assert asyncio.all_tasks() == {asyncio.current_task()}
