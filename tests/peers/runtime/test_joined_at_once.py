"""Engines of several devices as one, and a lone session's next token."""

from __future__ import annotations

import pytest
import torch

from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, at_once, new_session
from tests.peers.runtime.test_joined import PARTS, SPAN, assert_nothing_left, joined, work

pytestmark = pytest.mark.usefixtures("momentary")


@pytest.mark.parametrize("part", PARTS)
async def test_a_token_is_computed_where_it_arrives_if_one_engine_has_all_its_blocks(part: BlockSpan) -> None:
    async with joined(Local("llama", SPAN)) as engine:
        await engine.prepared()
        session, control = new_session(), new_session()
        assert at_once(engine, work(session, 0, 1, span=part)) is None, "nobody knows it yet"
        for start in range(2):
            await engine.run(work(session, start, 1, span=part))
        output = at_once(engine, work(session, 2, 1, span=part))
        assert output is not None
        for start in range(3):
            expected = await engine.run(work(control, start, 1, span=part))
        assert torch.equal(output, expected.hidden)
        engine.release(session)
        assert at_once(engine, work(session, 3, 1, span=part)) is None, "nobody knows it any more"
        engine.release(control)
        assert_nothing_left(engine)


async def test_a_token_that_passes_several_engines_is_begun_in_none_of_them() -> None:
    async with joined(Local("llama", SPAN)) as engine:
        await engine.prepared()
        session = new_session()
        for start in range(3):
            await engine.run(work(session, start, 1))
            assert at_once(engine, work(session, start + 1, 1)) is None
            assert [part.held(session) for part in engine._engines] == [start + 1] * 2
        engine.release(session)
        assert_nothing_left(engine)
