from __future__ import annotations

from typing import Any

import pytest
import torch

from peers.capacity import CACHE_TOKENS_DEFAULT, PROCESS_BYTES, plan_capacity
from peers.errors import PeerTooSmall
from routing.errors import CallerError, InvalidSpan
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS

CONFIG = FAMILIES["llama"].config()


def test_a_peer_with_room_may_host_every_block_with_the_usual_cache() -> None:
    plan = plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30)
    assert (plan.num_blocks, plan.max_blocks, plan.cache_tokens) == (NUM_BLOCKS, NUM_BLOCKS, CACHE_TOKENS_DEFAULT)
    assert plan.dtype == torch.float32


def test_memory_bounds_the_blocks_and_less_cache_makes_room_for_more() -> None:
    tight = PROCESS_BYTES + (5 << 20)
    roomy = plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight, cache_tokens=1000)
    full = plan_capacity(CONFIG, device="cpu", max_memory_bytes=tight, cache_tokens=16_000)
    assert 1 <= full.max_blocks < roomy.max_blocks == NUM_BLOCKS


def test_a_peer_too_small_for_one_block_is_told_the_sizes() -> None:
    with pytest.raises(PeerTooSmall, match="may use 668 MiB") as raised:
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES)
    assert "--max-memory" in raised.value.hint


def test_asked_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeerTooSmall, match="3 block"):
        plan_capacity(
            CONFIG, device="cpu", max_memory_bytes=PROCESS_BYTES + 100_000, cache_tokens=256, blocks=BlockSpan(0, 3)
        )


@pytest.mark.parametrize("wrong", [{"blocks": BlockSpan(2, NUM_BLOCKS + 1)}, {"num_blocks": 99}, {"num_blocks": 0}])
def test_blocks_that_the_model_does_not_have_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSpan, match=str(NUM_BLOCKS)):
        plan_capacity(CONFIG, device="cpu", max_memory_bytes=4 << 30, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"device": name} for name in ("abacus", "meta", "xpu", "cpu:7", "cuda:", "cuda:-1", "cuda:77")),
        {"dtype": "int3", "device": "cpu"},
        *({"device": "cpu", "cache_tokens": tokens} for tokens in (-1, 0, 1, 15)),
    ],
)
def test_a_device_or_dtype_that_is_not_here_or_no_cache_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CallerError) as caught:
        plan_capacity(CONFIG, max_memory_bytes=4 << 30, **wrong)
    assert caught.value.hint
