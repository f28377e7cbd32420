from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peers.model.catalog import resolve
from peers.model.cutting import SpanModel
from peers.model.loading import load_span
from peers.model.rotary import RotaryRegime
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, random_model, save_checkpoint

ORIGINAL_POSITIONS = 16
LENGTHS = [40, 9, 23, 16, 17, 60, 12]
"""Forwards of short and long users in turn: what one leaves behind in a rotary module must not reach the next."""


@pytest.fixture(scope="module", params=["phi3-longrope", "llama-dynamic"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(name: str, tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    folder = tmp_path_factory.mktemp(name)
    save_checkpoint(FAMILIES[name], folder)
    checkpoint = resolve(str(folder), cache=folder / "cache")
    return load_span(checkpoint, BlockSpan(0, NUM_BLOCKS), dtype=torch.float32, device="cpu")


@pytest.fixture
def local(name: str) -> Callable[[Tensor], Tensor]:
    """What the blocks of a fresh local model, which has seen no other forward, make of hidden states."""

    def run(hidden_1TH: Tensor) -> Tensor:
        decoder = random_model(FAMILIES[name].config()).model
        decoder.norm = torch.nn.Identity()
        return decoder(inputs_embeds=hidden_1TH, use_cache=False).last_hidden_state

    return run


def hidden_states(length: int) -> Tensor:
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length))


def positions(start: int, end: int) -> Tensor:
    return torch.arange(start, end)[None]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


@torch.inference_mode()
def test_chunks_of_a_prompt_use_the_frequencies_of_the_whole_prompt(
    peer: SpanModel, local: Callable[[Tensor], Tensor]
) -> None:
    for length in LENGTHS:
        hidden, cache = hidden_states(length), peer.new_cache()
        chunks = [
            peer.forward(
                hidden[:, start : start + 8],
                positions(start, min(start + 8, length)),
                past_key_values=cache,
                regime_length=length,
            )
            for start in range(0, length, 8)
        ]
        assert_equal(torch.cat(chunks, 1), local(hidden))


@torch.inference_mode()
def test_without_a_length_the_positions_decide(peer: SpanModel, local: Callable[[Tensor], Tensor]) -> None:
    for length in LENGTHS:
        assert_equal(peer.forward(hidden_states(length), positions(0, length)), local(hidden_states(length)))


@torch.inference_mode()
def test_the_length_matters(peer: SpanModel) -> None:
    hidden = hidden_states(8)
    short = peer.forward(hidden, positions(0, 8), regime_length=ORIGINAL_POSITIONS)
    long = peer.forward(hidden, positions(0, 8), regime_length=ORIGINAL_POSITIONS + 1)
    longer = peer.forward(hidden, positions(0, 8), regime_length=4 * ORIGINAL_POSITIONS)
    assert (short - long).abs().max() > 1e-3
    assert torch.equal(long, longer) == (peer.regime.kind == "longrope")


@torch.inference_mode()
def test_works_of_equal_key_may_share_a_forward(peer: SpanModel) -> None:
    by_key: dict[object, list[int]] = {}
    for length in (5, 16, 17, 17, 30, 30):
        by_key.setdefault(peer.regime.key(length), []).append(length)
    for lengths in by_key.values():
        results = [peer.forward(hidden_states(5), positions(0, 5), regime_length=length) for length in lengths]
        assert all(torch.equal(result, results[0]) for result in results)
    assert peer.regime.original_positions == ORIGINAL_POSITIONS


def test_keys_follow_the_kind() -> None:
    none = RotaryRegime(kind="none", original_positions=0)
    longrope = RotaryRegime(kind="longrope", original_positions=16)
    dynamic = RotaryRegime(kind="dynamic", original_positions=16)
    assert none.key(5) == none.key(5000)
    assert longrope.key(1) == longrope.key(16) != longrope.key(17) == longrope.key(5000)
    assert dynamic.key(1) == dynamic.key(16) != dynamic.key(17) != dynamic.key(18)


def test_most_models_have_no_regime(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["gemma3"], tmp_path)
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache")
    assert load_span(checkpoint, BlockSpan(0, 1), dtype="auto", device="cpu").regime.kind == "none"
