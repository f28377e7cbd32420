"""Sessions that begin with what another one computed say what they would have said alone, and cost nobody room."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from peers.errors import Preempted
from peers.runtime.engine import Engine
from peers.runtime.works import PositionGap, SessionReleased
from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import BlockSpan, PeerId
from tests.peers.runtime.spans import ALICE, Local, Sequence, assert_same, new_session, random_ids, running, together

pytestmark = pytest.mark.usefixtures("plain_forwards")

BLOCK = PREFIX_POSITIONS
SPAN = BlockSpan(1, 4)
KEYS = [bytes([index]) * 16 for index in range(4)]
BOB = PeerId("bob")


@pytest.fixture(scope="module")
def local() -> Local:
    return Local("llama", SPAN)


class Prompted(Sequence):
    """A sequence that begins with the first tokens of one and the same text, and offers keys for its blocks."""

    def begin(self, tokens: int, *, keys: list[bytes] = KEYS, owner: PeerId = ALICE) -> int:
        """Open, and take what the engine has of the text's first `tokens` positions; returns how many that are."""
        self.text = random_ids(tokens, 7)
        held = self.engine.open(self.session, owner, self.local.span, keys[: tokens // BLOCK])
        if held:
            self.steps.append(self.text[:held])
        return held

    async def send_rest(self, start: int | None = None) -> None:
        self.roll_back(self.length if start is None else start)
        self.steps.append(self.text[self.length :])
        start = self.length - len(self.steps[-1])
        hidden, expected = self.local.follow(self.steps)
        assert_same((await self.engine.run(self.work(start, hidden))).hidden, expected, self.local.error)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "opt", "deepseek-v3"])
@pytest.mark.parametrize("page_size", [4, 24])
async def test_a_session_goes_on_from_another_ones_positions(family: str, page_size: int) -> None:
    local = Local(family, SPAN)
    async with running(local.cut(), cache_tokens=1536, page_size=page_size) as engine:
        block = BLOCK if page_size == 4 else 3 * BLOCK
        first, second, third = (Prompted(local, engine, seed=seed) for seed in (1, 20, 30))
        assert first.begin(3 * BLOCK + 9) == 0
        await first.send_rest()
        assert second.begin(3 * BLOCK + 5) == 3 * BLOCK  # while the first still runs
        await together(second.send_rest(), first.step(3))
        await together(second.step(3), first.step(1))
        engine.release(first.session)
        engine.release(second.session)
        assert third.begin(3 * BLOCK + 20) == 3 * BLOCK // block * block  # and when nobody does
        await third.send_rest(start=3 * BLOCK - 7)  # as another hop holds less
        await third.step(2)
        third.roll_back(BLOCK + 3)
        await third.step(70)
        fourth = Prompted(local, engine, seed=40)
        assert fourth.begin(3 * BLOCK + 20) == 3 * BLOCK
        await fourth.send_rest()
        for sequence in (third, fourth):
            engine.release(sequence.session)
        stats = engine.stats()
        assert stats.free_tokens == stats.total_tokens
        assert stats.kept_tokens == 3 * BLOCK
        assert (stats.prefix_hits, stats.prefix_tokens) == (3, 9 * BLOCK)


async def test_keys_count_for_one_client_and_one_span_unless_the_operator_widens_that(local: Local) -> None:
    for sharing, held in (("owner", 0), ("network", BLOCK)):
        async with running(local.cut(), share_prefixes=sharing) as engine:
            first = Prompted(local, engine)
            first.begin(BLOCK)
            await first.send_rest()
            assert engine.open(new_session(), BOB, SPAN, KEYS) == held
            assert engine.open(new_session(), ALICE, BlockSpan(1, 3), KEYS) == 0
            assert engine.open(new_session(), ALICE, SPAN, KEYS[1:]) == 0
            assert engine.open(new_session(), ALICE, SPAN, ()) == 0
            assert engine.open(new_session(), ALICE, SPAN, KEYS) == BLOCK


async def test_a_family_that_runs_alone_keeps_nothing() -> None:
    local = Local("bloom", SPAN)
    async with running(local.cut()) as engine:
        first = Prompted(local, engine)
        assert first.begin(BLOCK) == 0
        await first.send_rest()
        assert engine.open(new_session(), ALICE, SPAN, KEYS) == 0
        assert engine.stats().kept_tokens == 0


async def test_blocks_of_another_span_are_not_kept(local: Local) -> None:
    async with running(local.cut()) as engine:
        first = Prompted(local, engine)
        first.begin(BLOCK)
        hidden, _ = local.follow([first.text])
        work = first.work(0, hidden)
        narrower = type(work)(
            session=work.session, owner=work.owner, start=0, hidden=hidden, span=BlockSpan(1, 3), parent=None
        )
        await engine.run(narrower)
        assert engine.open(new_session(), ALICE, SPAN, KEYS) == 0


async def test_what_is_kept_goes_before_any_session_does(local: Local) -> None:
    async with running(local.cut(), cache_tokens=4 * BLOCK) as engine:
        first = Prompted(local, engine)
        first.begin(2 * BLOCK)
        await first.send_rest()
        engine.release(first.session)
        assert engine.stats().kept_tokens == 2 * BLOCK
        oldest, newest = Sequence(local, engine, seed=50), Sequence(local, engine, seed=60)
        await oldest.step(2 * BLOCK)
        await newest.step(BLOCK)
        assert engine.stats().kept_tokens == BLOCK
        await newest.step(BLOCK)
        assert (engine.stats().kept_tokens, engine.stats().free_tokens) == (0, 0)
        with pytest.raises(Preempted):
            await newest.step(1)


async def test_a_session_that_lost_what_it_began_with_is_told_to_replay(local: Local) -> None:
    async with running(local.cut(), cache_tokens=4 * BLOCK) as engine:
        old, first, second = Sequence(local, engine, seed=50), Prompted(local, engine), Prompted(local, engine)
        await old.step(2 * BLOCK)
        first.begin(BLOCK)
        await first.send_rest()
        engine.release(first.session)
        assert second.begin(BLOCK) == BLOCK
        await old.step(2 * BLOCK)
        with pytest.raises(Preempted):
            await second.step(1)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_clients_do_hits_are_right_and_all_pages_come_back(local: Local, seed: int) -> None:
    """Prompts, steps, rollbacks, forks and releases at random on a cache that is too small; every output is checked."""
    rng = random.Random(seed)

    async def live(engine: Engine, number: int) -> None:
        for turn in range(4):
            sequence = Prompted(local, engine, seed=1000 * number + 100 * turn, owner=rng.choice([ALICE, BOB]))
            children: list[Sequence] = []
            with suppress(Preempted, PositionGap, SessionReleased):
                held = sequence.begin(rng.choice([70, 130, 200]), owner=sequence.owner)
                await sequence.send_rest(rng.choice([held, held, max(0, held - 30)]))
                for _ in range(3):
                    sequence.roll_back(max(1, sequence.length - rng.choice([0, 0, 1, 80])))
                    children.append(sequence.fork(sequence.length))
                    await together(sequence.step(rng.choice([1, 1, 9, 70])), children[-1].step(1))
            for each in (sequence, *children):
                engine.release(each.session)

    async with running(local.cut(), cache_tokens=700) as engine:
        await together(*(live(engine, number) for number in range(4)))
        stats = engine.stats()
        assert (stats.free_tokens, stats.queued_tokens, stats.sessions) == (stats.total_tokens, 0, 0)
        assert stats.prefix_hits
