from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from peers.model import cutting
from peers.model.catalog import resolve
from peers.model.cutting import SpanModel
from peers.model.loading import load_client, load_span
from peers.model.skeleton import embed_only, install_route
from peers.model.support import KeyValueShape, accepted_names, find_layers
from routing.errors import InvalidSpan
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint

PROMPT_TOKENS = 11
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A whole model, and the same checkpoint as a client and two overlapping spans."""

    whole: PreTrainedModel
    client: PreTrainedModel
    peers: Sequence[SpanModel]

    @property
    def hops(self) -> Sequence[tuple[SpanModel, BlockSpan]]:
        """Uneven parts of what the peers hold."""
        first, second = self.peers
        return [(first, BlockSpan(0, 1)), (second, BlockSpan(1, 3)), (second, BlockSpan(3, NUM_BLOCKS))]


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Parts]:
    @functools.cache
    def make(name: str) -> Parts:
        folder = tmp_path_factory.mktemp(name)
        return load_parts(save_checkpoint(FAMILIES[name], folder), folder)

    return make


def load_parts(whole: PreTrainedModel, folder: Path) -> Parts:
    checkpoint = resolve(str(folder), cache=folder / "cache")
    spans = BlockSpan(0, 2), BlockSpan(1, NUM_BLOCKS)
    return Parts(
        whole=whole,
        client=load_client(checkpoint, dtype=torch.float32, device="cpu"),
        peers=[load_span(checkpoint, span, dtype=torch.float32, device="cpu") for span in spans],
    )


class OwnCaches:
    """A route through the hops of `parts` in this process, with the model's own cache at each."""

    def __init__(self, parts: Parts) -> None:
        self.hops = parts.hops
        self.caches = [peer.new_cache(span) for peer, span in self.hops]
        self.length = 0

    def __call__(self, hidden_1TH: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        positions_1T = torch.arange(self.length, self.length + hidden_1TH.shape[1])[None]
        for (peer, span), cache in zip(self.hops, self.caches, strict=True):
            hidden_1TH = peer.forward(hidden_1TH, positions_1T, span=span, past_key_values=cache)
        self.length += hidden_1TH.shape[1]
        return hidden_1TH


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5, relative to the largest value: what a block returns is not normalised."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=TOLERANCE * scale, rtol=0)


def client_logits(client: PreTrainedModel, ids_1T: Tensor, start: int) -> Tensor:
    positions_1T = torch.arange(start, start + ids_1T.shape[1])[None]
    takes_positions = accepted_names(client.forward) & {"position_ids", "kwargs"}
    return client(ids_1T, use_cache=False, **({"position_ids": positions_1T} if takes_positions else {})).logits


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES, scope="module")  # one family after another: each is loaded once
@torch.inference_mode()
def test_client_and_uneven_spans_equal_the_whole_model(name: str, parts_of: Callable[[str], Parts]) -> None:
    parts = parts_of(name)
    install_route(parts.client, OwnCaches(parts))
    own_cache = DynamicCache(config=parts.whole.config)
    ids, start = prompt(), 0
    for _ in range(8):
        expected = parts.whole(ids, past_key_values=own_cache, use_cache=True).logits
        logits = client_logits(parts.client, ids, start)
        assert_equal(logits, expected)
        assert logits[0, -1].argmax() == expected[0, -1].argmax()
        start += ids.shape[1]
        ids = expected[:, -1:].argmax(-1)
    assert all(peer.pluggable == FAMILIES[name].pluggable for peer in parts.peers)


@pytest.mark.parametrize("name", FAMILIES, scope="module")
@torch.inference_mode()
def test_embed_only_gives_what_enters_the_first_block(name: str, parts_of: Callable[[str], Parts]) -> None:
    parts = parts_of(name)
    whole, seen = parts.whole, []
    first = next(whole.get_submodule(find_layers(whole)).children())
    with first.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    ):
        whole(prompt(), use_cache=False)
    torch.testing.assert_close(embed_only(parts.client, prompt()), seen[0], atol=0, rtol=0)
    later = embed_only(parts.client, prompt()[:, 4:], torch.arange(4, PROMPT_TOKENS)[None])
    torch.testing.assert_close(later, seen[0][:, 4:], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "bloom", "opt", "gpt-neo"])
@torch.inference_mode()
def test_the_checkpoints_make_mistakes_show(name: str, parts_of: Callable[[str], Parts]) -> None:
    whole, ids = parts_of(name).whole, prompt()
    swapped = ids[:, [0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10]]
    moved = (whole(ids).logits - whole(swapped).logits)[0, -1].abs().max()
    assert moved > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "bloom"])
@torch.inference_mode()
def test_padded_rows_equal_the_whole_model(name: str, parts_of: Callable[[str], Parts]) -> None:
    parts = parts_of(name)
    ids = torch.cat((prompt(1), prompt(2)))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = parts.whole(ids, attention_mask=mask, **_positions(parts.whole, positions)).logits

    def route(hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        for peer, span in parts.hops:
            hidden = peer.forward(hidden, positions, span=span, attention_mask=mask)
        return hidden

    install_route(parts.client, route)
    logits = parts.client(ids, attention_mask=mask, use_cache=False, **_positions(parts.client, positions)).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)


def _positions(model: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    return {"position_ids": positions} if "position_ids" in accepted_names(model.forward) else {}


@pytest.mark.parametrize("name", ["mistral", "gpt-neo", "llama4", "bloom"])
@torch.inference_mode()
def test_an_own_cache_can_be_cropped_to_any_length(name: str, parts_of: Callable[[str], Parts]) -> None:
    peer = parts_of(name).peers[1]
    hidden = torch.randn(1, 12, peer.hidden_size, generator=torch.Generator().manual_seed(0))
    cache = peer.new_cache()
    positions = torch.arange(12)[None]
    expected = peer.forward(hidden, positions, past_key_values=peer.new_cache())
    peer.forward(torch.cat((hidden[:, :2], hidden[:, 5:]), 1), positions[:, :9], past_key_values=cache)
    cache.crop(-7)
    rest = peer.forward(hidden[:, 2:], positions[:, 2:], past_key_values=cache)
    assert_equal(rest, expected[:, 2:])


def test_everything_outside_the_blocks_costs_no_memory(parts_of: Callable[[str], Parts]) -> None:
    for name in ("llama-tied", "gpt2", "opt"):
        peer = parts_of(name).peers[1]
        tensors = [*peer.module.parameters(), *peer.module.buffers()]
        held = sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().nbytes() > 8)
        assert peer.weight_bytes <= held < peer.weight_bytes + 1024  # rotary frequencies and such


def test_blocks_that_are_not_loaded_are_refused(parts_of: Callable[[str], Parts]) -> None:
    peer = parts_of("llama").peers[1]
    hidden = torch.zeros(1, 1, peer.hidden_size)
    with pytest.raises(InvalidSpan, match=r"0:3 are not among the 1:4"):
        peer.forward(hidden, torch.tensor([[0]]), span=BlockSpan(0, 3))


@torch.inference_mode()
def test_sub_spans_come_and_go(parts_of: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MAX_VIEWS", 2)
    peer = parts_of("gemma2").peers[1]
    hidden = torch.randn(1, 6, peer.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    expected = peer.forward(hidden, positions)
    for _ in range(2):
        stepwise = hidden
        for block in peer.span:
            stepwise = peer.forward(stepwise, positions, span=BlockSpan(block, block + 1))
        assert_equal(stepwise, expected)


def test_a_span_describes_itself(parts_of: Callable[[str], Parts]) -> None:
    peer = parts_of("qwen3").peers[1]
    assert (peer.span, peer.num_blocks, peer.hidden_size) == (BlockSpan(1, NUM_BLOCKS), NUM_BLOCKS, 32)
    assert (peer.max_positions, peer.dtype, peer.device) == (256, torch.float32, torch.device("cpu"))
    assert peer.config.num_hidden_layers == NUM_BLOCKS - 1
    assert peer.kv_shapes == (KeyValueShape(heads=2, key_size=12, value_size=12),) * (NUM_BLOCKS - 1)
    latent = parts_of("deepseek-v3").peers[0].kv_shapes[0]
    assert latent == KeyValueShape(heads=4, key_size=12, value_size=6)
    assert latent.elements == 72


class PassThrough(Cache):
    """A cache that keeps nothing: a registered attention function sees the keys and values of this forward alone."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class Packed:
    """A toy for the engine's attention: sessions that all start at position 0, one after another in one forward."""

    lengths: Sequence[int] = ()

    @staticmethod
    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        outputs = []
        parts = (each.split(list(Packed.lengths), dim=2) for each in (q, k, v))
        for part_q, part_k, part_v in zip(*parts, strict=True):
            positions = torch.arange(part_q.shape[2])
            allowed = mask(torch.zeros(1, dtype=torch.long), 0, positions[:, None], positions[None, :])
            groups = part_q.shape[1] // part_k.shape[1]
            scores = part_q @ part_k.repeat_interleave(groups, 1).transpose(2, 3) * kwargs["scaling"]
            if cap := kwargs.get("softcap"):
                scores = (scores / cap).tanh() * cap
            scores = scores.masked_fill(~allowed.expand(scores.shape[2:]), float("-inf"))
            if (sinks := kwargs.get("s_aux")) is not None:
                scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
            weights = scores.softmax(-1)[..., : part_k.shape[2]]
            outputs.append(weights @ part_v.repeat_interleave(groups, 1))
        return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("test_packed", Packed.attend)
AttentionMaskInterface.register("test_packed", lambda *, mask_function, **_: mask_function)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.pluggable])
@torch.inference_mode()
def test_a_registered_attention_serves_sessions_of_different_lengths_in_one_forward(
    name: str, parts_of: Callable[[str], Parts]
) -> None:
    peer = parts_of(name).peers[1]
    Packed.lengths = [7, 3, 11]
    sessions = [torch.randn(1, n, peer.hidden_size, generator=torch.Generator().manual_seed(n)) for n in Packed.lengths]
    positions = [torch.arange(n)[None] for n in Packed.lengths]
    alone = [
        peer.forward(hidden, own, past_key_values=peer.new_cache())
        for hidden, own in zip(sessions, positions, strict=True)
    ]
    peer.set_attention("test_packed")
    together = peer.forward(torch.cat(sessions, 1), torch.cat(positions, 1), past_key_values=PassThrough())
    peer.set_attention(None)
    assert_equal(together, torch.cat(alone, 1))
    again = peer.forward(sessions[0], positions[0], past_key_values=peer.new_cache())
    torch.testing.assert_close(again, alone[0], atol=0, rtol=0)
