"""Layers that slide hold what their window needs and no more, and say when a session goes back behind that."""

from __future__ import annotations

import pytest

from peers.model.support import examine
from peers.runtime.cache import PagedCache
from peers.runtime.engine import Engine
from peers.runtime.works import BehindWindow, CacheTooSmall
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES
from tests.peers.runtime.spans import Local, Sequence, running, together

WINDOW, SLACK, PAGE = 4, 10, 4
SPAN = BlockSpan(0, 3)


@pytest.fixture(scope="module")
def hybrid() -> Local:
    """Blocks that slide, see everything, and slide."""
    return Local("gemma3", SPAN)


@pytest.fixture(scope="module")
def sliding() -> Local:
    return Local("mistral", SPAN)


def pages_of(engine: Engine) -> list[int]:
    """Of all sessions, in each table."""
    sessions = engine._pages._sessions.values()
    return [
        sum(len(session.tables[table].pages) for session in sessions) for table in range(len(engine._pages.windows))
    ]


def test_what_each_block_sees_is_asked_of_its_mask() -> None:
    windows = {name: examine(FAMILIES[name].config()).windows for name in ("llama", "mistral", "gpt-oss", "bloom")}
    assert windows == {
        "llama": (None,) * 4,
        "mistral": (WINDOW,) * 4,
        "gpt-oss": (WINDOW, None) * 2,
        "bloom": (None,) * 4,  # its attention is its own
    }


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gemma4", "gemma4-moe", "mimo-v2"])
async def test_sessions_many_windows_long_equal_the_local_model(family: str) -> None:
    local = Local(family, SPAN)
    async with running(local.cut(), cache_tokens=1024, slack=SLACK) as engine:
        assert isinstance(engine._cache, PagedCache)
        first, second = Sequence(local, engine), Sequence(local, engine, seed=100)
        await together(first.step(150), second.step(70))
        for _ in range(6):
            await together(first.step(1), second.step(2))
        first.roll_back(first.length - SLACK)
        await together(first.step(5), second.step(40))
        child = first.fork(first.length - 3)
        await together(child.step(2), first.step(1), second.step(1))
        assert first.replays == second.replays == child.replays == 0


async def test_pages_behind_the_window_are_free_for_others(hybrid: Local) -> None:
    async with running(hybrid.cut(), cache_tokens=200, slack=SLACK) as engine:
        assert engine._pages.windows == (WINDOW, WINDOW, None)
        assert engine.stats().longest_tokens == 256, "as long as the model allows, in a cache of 200 positions"
        first, second = Sequence(hybrid, engine), Sequence(hybrid, engine, seed=100)
        await first.step(64)
        await first.step(64)
        assert pages_of(engine) == [20, 20, 32], "the last 64, the slack, and what the first of these sees"
        await first.step(1)
        bound = -(-(WINDOW + SLACK) // PAGE) + 1
        assert pages_of(engine) == [bound, bound, 33]
        for _ in range(5):
            await first.step(1)
            assert pages_of(engine)[0] <= bound
        await second.step(64)
        for _ in range(3):
            await together(first.step(20), second.step(20))
        assert first.length + second.length > 300
        assert engine.stats().sessions == 2
        for sequence in (first, second):
            engine.release(sequence.session)
        stats = engine.stats()
        assert stats.free_tokens == stats.total_tokens == 200


async def test_layers_that_store_unlike_things_leave_each_other_their_pages() -> None:
    local = Local("gemma4-moe", SPAN)  # a frame holds two of its layers
    async with running(local.cut(), cache_tokens=200, slack=SLACK) as engine:
        assert engine._pages.windows == (WINDOW, None)
        assert engine.stats().total_tokens == 148, "half of what the second table has in the frame is empty"
        assert engine.stats().longest_tokens == 216
        sequence = Sequence(local, engine)
        for tokens in (64, 64, 64, 20, 1):
            await sequence.step(tokens)
        assert pages_of(engine) == [-(-(WINDOW + SLACK) // PAGE) + 1, 54]
        sequence.roll_back(213 - SLACK)
        child = sequence.fork(200)
        await together(sequence.step(2), child.step(3))
        engine.release(sequence.session)
        engine.release(child.session)
        assert engine.stats().free_tokens == 148


async def test_a_model_that_slides_everywhere_needs_no_more_for_longer_sessions(sliding: Local) -> None:
    async with running(sliding.cut(), cache_tokens=100, slack=SLACK) as engine:
        assert engine.stats().longest_tokens == 256
        sequence = Sequence(sliding, engine)
        for _ in range(4):
            await sequence.step(60)
        assert engine.weight(240) == engine.weight(150) < 100
        engine.set_token_budget(256)
        reckoned = engine.weight(4096), engine.stats()
        engine.set_token_budget(2048)
        assert (engine.weight(4096), engine.stats()) == reckoned, "works are as large as before"
        with pytest.raises(CacheTooSmall):
            await Sequence(sliding, engine).step(101)


@pytest.mark.parametrize("model", ["hybrid", "sliding"])
async def test_behind_the_slack_a_session_is_sent_again_and_loses_nothing_by_the_refusal(
    model: str, request: pytest.FixtureRequest
) -> None:
    local: Local = request.getfixturevalue(model)
    async with running(local.cut(), slack=SLACK) as engine:
        sequence = Sequence(local, engine)
        await sequence.step(60)
        await sequence.step(1)
        held = engine.held(sequence.session)
        hidden, _ = local.follow(sequence.steps)
        with pytest.raises(BehindWindow):
            await engine.run(sequence.work(20, hidden))
        assert engine.held(sequence.session) == held
        await sequence.step(1)
        with pytest.raises(BehindWindow):
            await engine.run(sequence.fork(20).work(20, hidden))
        assert sequence.replays == 0
        child = sequence.fork(20)
        await child.step(3)
        sequence.roll_back(20)
        await sequence.step(3)
        assert (sequence.replays, child.replays) == (1, 1)
        sequence.roll_back(0)
        await sequence.step(9)
        assert sequence.replays == 1


async def test_drafts_within_the_slack_are_rolled_back_for_ever(hybrid: Local) -> None:
    async with running(hybrid.cut(), slack=SLACK) as engine:
        sequence = Sequence(hybrid, engine)
        await sequence.step(40)
        for accepted in (0, 3, SLACK, 0, 0, 7, 1) * 2:
            await sequence.step(1 + SLACK)
            sequence.roll_back(sequence.length - SLACK + accepted)
        await sequence.step(1)
        assert sequence.replays == 0


async def test_after_single_tokens_a_session_goes_back_by_the_slack_too(hybrid: Local) -> None:
    async with running(hybrid.cut(), slack=SLACK) as engine:
        sequence = Sequence(hybrid, engine)
        await sequence.step(40)
        for back in range(SLACK - PAGE, SLACK + 1):
            for _ in range(SLACK):
                await sequence.step(1)
            sequence.roll_back(sequence.length - back)
            await sequence.step(1)
        assert sequence.replays == 0
