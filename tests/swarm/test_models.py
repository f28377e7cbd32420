"""A model whose layers are remote equals the local model of the same checkpoint, wherever a local model makes sense."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from routing.errors import CallerError
from swarm.errors import (
    ContextTooLong,
    SessionClosed,
    UnsupportedCache,
    UnsupportedGradient,
    UnsupportedMask,
    UnsupportedOutput,
    WeightsAreRemote,
)
from swarm.models import SwarmModelForCausalLM
from swarm.models.cache import SwarmCache
from tests.helpers.families import VOCABULARY
from tests.helpers.local_remote import World, make_world, world_of

EVERY_KIND = ("llama", "gpt2", "gemma2", "gemma3", "mixtral", "opt", "bloom", "phi3-longrope", "llama-dynamic")
ATOL = 2e-5


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = world_of(getattr(request, "param", "llama"))
    world.remote.reset()
    yield world
    world.remote.assert_clean()


every_kind = pytest.mark.parametrize("world", EVERY_KIND, indirect=True)
some_kinds = pytest.mark.parametrize("world", ["llama", "opt", "phi3-longrope"], indirect=True)


def prompt(rows: int = 1, tokens: int = 7, *, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padding(*, left: tuple[int, ...] = (0, 3), right: tuple[int, ...] = (0, 0), tokens: int = 7) -> Tensor:
    """A mask with one row per number."""
    mask = torch.ones(len(left), tokens, dtype=torch.long)
    for row, (first, last) in enumerate(zip(left, right, strict=True)):
        mask[row, :first] = 0
        mask[row, tokens - last :] = 0
    return mask


def both(world: World, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What the local model and the client generate."""
    results = []
    for model in (world.local, world.model):
        torch.manual_seed(seed)
        results.append(model.generate(*args, pad_token_id=0, **kwargs))
    return results[0], results[1]


def assert_logits_equal(world: World, ids: Tensor, mask: Tensor | None, **kwargs: Any) -> None:
    local = world.local(ids, attention_mask=mask, **kwargs).logits
    ours = world.model(ids, attention_mask=mask, **kwargs).logits
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    assert ours.shape == local.shape
    torch.testing.assert_close(ours[kept], local[kept], atol=ATOL, rtol=1e-4)


# The object


def test_is_an_instance_of_its_own_class_and_says_so_by_name(world: World) -> None:
    assert isinstance(world.model, LlamaForCausalLM)
    assert isinstance(world.model, SwarmModelForCausalLM)
    assert type(world.model).__name__ == "LlamaForCausalLM"
    assert world.model.num_parameters() == world.local.num_parameters()
    assert world.model.config.to_diff_dict() == world.local.config.to_diff_dict()


def test_saving_is_refused_because_the_weights_are_remote(world: World) -> None:
    with pytest.raises(WeightsAreRemote):
        world.model.save_pretrained("anywhere")
    with pytest.raises(WeightsAreRemote):
        world.model.state_dict()
    assert "0.lm_head.weight" in torch.nn.Sequential(world.model).state_dict()  # as PEFT looks for its adapters


def test_another_dtype_costs_no_memory_for_the_layers() -> None:
    world = make_world("llama")
    model = world.model.to(torch.bfloat16)
    weights = [(name, weight) for name, weight in model.named_parameters() if ".layers." in name]
    assert {weight.dtype for _, weight in weights} == {torch.bfloat16}
    assert sum(weight.untyped_storage().nbytes() for _, weight in weights) == 2 * len(weights)
    assert {name: weight.shape for name, weight in weights} == {
        name: weight.shape for name, weight in world.local.named_parameters() if ".layers." in name
    }
    world.remote.embed = None
    assert model(prompt()).logits.dtype == torch.bfloat16
    model.close()


def test_a_closed_model_refuses_everything_and_releases_what_it_held() -> None:
    world = make_world("llama")
    with world.model as model:
        cache = model(prompt()).past_key_values
        assert world.remote.open_sessions
    world.remote.assert_clean()
    assert world.remote.closed
    model.close()
    for call in (
        lambda: model(prompt()),
        lambda: model.generate(prompt()),
        lambda: model(prompt(), past_key_values=cache),
        model.session,
    ):
        with pytest.raises(SessionClosed):
            call()


# Generation


@every_kind
def test_greedy_ids_equal_local_with_left_padding(world: World) -> None:
    local, ours = both(world, prompt(2), attention_mask=padding(), max_new_tokens=14, do_sample=False)
    assert torch.equal(local, ours)


@every_kind
def test_beams_equal_local(world: World) -> None:
    arguments = {"attention_mask": padding(), "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
    local, ours = both(world, prompt(2), do_sample=False, **arguments)
    assert torch.equal(local, ours)


@some_kinds
@pytest.mark.parametrize(("num_beams", "do_sample"), [(2, False), (5, True)])
def test_narrow_wide_and_sampled_beams_equal_local(world: World, num_beams: int, do_sample: bool) -> None:
    arguments = {"max_new_tokens": 10, "num_beams": num_beams, "num_return_sequences": num_beams}
    local, ours = both(world, prompt(), do_sample=do_sample, eos_token_id=None, **arguments)
    assert torch.equal(local, ours)


@every_kind
def test_seeded_samples_equal_local(world: World) -> None:
    arguments = {"max_new_tokens": 6, "num_return_sequences": 2, "top_k": 20, "temperature": 0.8}
    local, ours = both(world, prompt(2), attention_mask=padding(), do_sample=True, seed=3, **arguments)
    assert torch.equal(local, ours)


@every_kind
def test_prompt_lookup_equals_local(world: World) -> None:
    repeated = prompt(tokens=5).repeat(1, 3)
    local, ours = both(world, repeated, max_new_tokens=16, prompt_lookup_num_tokens=3, do_sample=False)
    assert torch.equal(local, ours)


@some_kinds
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_equals_local(world: World, do_sample: bool) -> None:
    assistant = copy.deepcopy(world.local)
    with torch.no_grad():
        assistant.lm_head.weight += 0.1 * torch.randn(assistant.lm_head.weight.shape)
    arguments = {"max_new_tokens": 16, "assistant_model": assistant, "do_sample": do_sample, "eos_token_id": None}
    local, ours = both(world, prompt(), seed=1, **arguments)
    assert torch.equal(local, ours)


@some_kinds
def test_without_a_cache_ids_equal_local_and_nothing_stays_open(world: World) -> None:
    arguments = {"attention_mask": padding(), "max_new_tokens": 5, "use_cache": False, "do_sample": False}
    local, ours = both(world, prompt(2), **arguments)
    assert torch.equal(local, ours)


@some_kinds
def test_a_prompt_in_chunks_equals_local(world: World) -> None:
    arguments = {"max_new_tokens": 12, "prefill_chunk_size": 4, "do_sample": False}
    local, ours = both(world, prompt(2, 14), attention_mask=padding(tokens=14), **arguments)
    assert torch.equal(local, ours)


@some_kinds
def test_generation_from_embeddings_equals_local(world: World) -> None:
    embeds = world.local.get_input_embeddings()(prompt(2))
    local, ours = both(world, inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(local, ours)
    assert world.remote.runs[0][0].token_ids_T is None


def test_a_streamer_hears_the_same_tokens(world: World) -> None:
    class Notes:
        def __init__(self) -> None:
            self.heard: list[int] = []

        def put(self, value: Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.heard.append(-1)

    local, ours = Notes(), Notes()
    world.local.generate(prompt(), max_new_tokens=8, do_sample=False, streamer=local)
    world.model.generate(prompt(), max_new_tokens=8, do_sample=False, streamer=ours)
    assert ours.heard == local.heard


def test_a_returned_cache_goes_on_where_it_stopped(world: World) -> None:
    arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = world.model.generate(prompt(), max_new_tokens=5, return_dict_in_generate=True, **arguments)
    cache = first.past_key_values
    assert isinstance(cache, SwarmCache)
    sent = world.remote.tokens_sent
    ours = world.model.generate(first.sequences, past_key_values=cache, max_new_tokens=5, **arguments)
    assert world.remote.tokens_sent - sent == 5
    assert torch.equal(ours, world.local.generate(prompt(), max_new_tokens=10, **arguments))


@pytest.mark.parametrize("world", ["phi3-longrope"], indirect=True)
@pytest.mark.parametrize("tokens", [14, 16, 17])
def test_crossing_the_original_context_of_phi3_equals_local(world: World, tokens: int) -> None:
    for arguments in ({"num_beams": 1}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        local, ours = both(world, prompt(tokens=tokens), max_new_tokens=6, do_sample=False, **arguments)
        assert torch.equal(local, ours)


@some_kinds
def test_a_right_padded_row_goes_on_as_its_tokens_alone_would(world: World) -> None:
    ids, mask = prompt(2), padding(left=(0, 0), right=(0, 3))
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = world.model.generate(ids, attention_mask=mask, **arguments)
    for row, count in enumerate((7, 4)):
        alone = world.local.generate(ids[row : row + 1, :count], **arguments)
        assert torch.equal(ours[row, 7:], alone[0, count:])


# What crosses the network


def test_only_tokens_and_the_outputs_that_are_needed_cross_the_network(world: World) -> None:
    world.model.generate(
        prompt(2), attention_mask=padding(), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert world.remote.tokens_sent == 7 + 4 + 2 * 4
    assert world.remote.outputs_wanted == 2 * 5


def test_answers_to_one_prompt_send_it_once_and_fork_where_they_part(world: World) -> None:
    arguments = {"max_new_tokens": 2, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    ids = world.model.generate(prompt(), num_return_sequences=4, **arguments)
    different = len(set(ids[:, 7].tolist()))
    assert world.remote.tokens_sent == 7 + different
    assert world.remote.opened == different


def test_a_beam_keeps_its_session_unless_two_go_on_from_it(world: World) -> None:
    world.model.generate(prompt(), max_new_tokens=10, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert world.remote.tokens_sent == 7 + 3 * 9
    assert world.remote.forks == world.remote.opened - 1
    assert world.remote.opened < 3 * 9


@every_kind
def test_logits_to_keep_fetches_only_those(world: World) -> None:
    ids = prompt(2)
    for keep, wanted in ((2, 2), (torch.tensor([5]), 2), (torch.tensor([-1, 4]), 3), (0, 7), (9, 7)):
        world.remote.reset()
        ours = world.model(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(ours, world.local(ids, logits_to_keep=keep).logits, atol=ATOL, rtol=1e-4)
        assert world.remote.outputs_wanted == 2 * wanted


@pytest.mark.parametrize("world", ["opt"], indirect=True)
def test_rows_of_the_same_tokens_may_want_different_outputs(world: World) -> None:
    ids, mask = prompt().repeat(2, 1), padding(left=(0, 2), right=(2, 0))
    ids[1, 2:] = ids[0, :5]
    local, ours = (model(ids, attention_mask=mask, logits_to_keep=1).logits[1] for model in (world.local, world.model))
    torch.testing.assert_close(ours, local, atol=ATOL, rtol=1e-4)


# Forwards


@every_kind
@pytest.mark.parametrize(
    "mask", [None, padding(), padding(left=(0, 0), right=(2, 5)), padding(left=(1, 2), right=(3, 0))]
)
def test_logits_equal_local_with_any_padding(world: World, mask: Tensor | None) -> None:
    assert_logits_equal(world, prompt(2), mask)
    assert world.remote.tokens_sent == (14 if mask is None else mask.sum())


@every_kind
def test_decoding_by_hand_equals_local(world: World) -> None:
    ids, mask = prompt(2, 9), padding(tokens=9)
    caches = [model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values for model in (world.local, world.model)]
    for end in (7, 9):
        local, ours = (
            model(ids[:, end - (end - 5) // 2 : end], attention_mask=mask[:, :end], past_key_values=cache)
            for model, cache in zip((world.local, world.model), caches, strict=True)
        )
        assert ours.past_key_values is caches[1]
        torch.testing.assert_close(ours.logits, local.logits, atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("world", ["gemma3-vision"], indirect=True)
def test_a_model_around_the_decoder_may_make_masks_and_embeddings_of_its_own(world: World) -> None:
    assert_logits_equal(world, prompt(2), padding())
    assert world.remote.runs[0][0].token_ids_T is not None
    local, ours = both(world, prompt(2), attention_mask=padding(), max_new_tokens=4, do_sample=False)
    assert torch.equal(local, ours)


def test_losses_equal_local_and_ignore_what_padding_would_predict(world: World) -> None:
    ids, mask = prompt(2), padding(left=(0, 0), right=(0, 3))
    labels = ids.masked_fill(mask == 0, -100)
    local, ours = (model(ids, attention_mask=mask, labels=labels).loss for model in (world.local, world.model))
    torch.testing.assert_close(ours, local)

    left = mask.flip(1)
    labels = ids.masked_fill(left == 0, -100)
    ours = world.model(ids, attention_mask=left, labels=labels).loss
    labels[1, 3] = -100  # its prediction would come from the padding before it
    torch.testing.assert_close(ours, world.local(ids, attention_mask=left, labels=labels).loss)


def test_the_decoder_alone_and_positional_arguments_equal_local(world: World) -> None:
    ids, mask = prompt(2), padding()
    local, ours = (model.model(ids, mask).last_hidden_state for model in (world.local, world.model))
    torch.testing.assert_close(ours[mask.bool()], local[mask.bool()], atol=ATOL, rtol=1e-4)
    local, ours = (model(ids, mask).logits for model in (world.local, world.model))
    torch.testing.assert_close(ours[mask.bool()], local[mask.bool()], atol=ATOL, rtol=1e-4)


def test_a_cache_is_released_with_its_last_reference(world: World) -> None:
    outputs = world.model(prompt(2))
    assert len(world.remote.open_sessions) == 2
    del outputs
    world.remote.assert_clean()
    world.model(prompt(2), use_cache=False)
    world.remote.assert_clean()


# Masks and positions


@some_kinds
def test_holes_are_closed_when_positions_count_the_kept_tokens(world: World) -> None:
    ids, mask = prompt(2), padding()
    mask[0, 2:4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_logits_equal(world, ids, mask, position_ids=positions)
    assert world.remote.tokens_sent == mask.sum()


@pytest.mark.parametrize("world", ["opt"], indirect=True)
def test_holes_are_closed_where_the_model_itself_counts_kept_tokens(world: World) -> None:
    mask = padding()
    mask[0, 2:4] = 0
    assert_logits_equal(world, prompt(2), mask)


@pytest.mark.parametrize("world", ["llama", "bloom", "gemma3"], indirect=True)
def test_other_holes_are_refused_before_anything_is_sent(world: World) -> None:
    mask = padding()
    mask[0, 2:4] = 0
    positions = (
        {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if world.local.config.model_type == "gemma3_text" else {}
    )
    with pytest.raises(UnsupportedMask):
        world.model(prompt(2), attention_mask=mask, **positions)
    assert not world.remote.runs


def test_position_ids_may_start_anywhere_but_not_jump(world: World) -> None:
    ids = prompt()
    positions = torch.arange(7)[None] + 5
    assert_logits_equal(world, ids, None, position_ids=positions)
    assert world.remote.runs[0][0].position_offset == 5
    positions[0, 4:] += 1
    with pytest.raises(UnsupportedMask, match="one by one"):
        world.model(ids, position_ids=positions)
    cache = world.model(ids).past_key_values
    with pytest.raises(UnsupportedMask, match="goes on at position 9"):
        world.model(ids[:, :1], position_ids=torch.tensor([[9]]), past_key_values=cache)


def test_masks_that_cannot_travel_are_refused(world: World) -> None:
    ids, mask = prompt(2), padding()
    cache = world.model(ids, attention_mask=mask).past_key_values
    new, longer = ids[:, :1], torch.cat((mask, mask[:, -1:]), dim=1)
    for bad in (mask[:, :-1], mask[:, None, None], {"full_attention": mask}):
        with pytest.raises(UnsupportedMask):
            world.model(ids, attention_mask=bad)
    for bad in (None, mask, longer.flip(1), torch.ones_like(longer)):
        with pytest.raises(UnsupportedMask):
            world.model(new, attention_mask=bad, past_key_values=cache)
    world.model(new, attention_mask=longer, past_key_values=cache)


# Refusals


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states", "output_router_logits"])
@pytest.mark.parametrize("world", ["mixtral"], indirect=True)
def test_what_lies_inside_the_layers_is_refused(world: World, name: str) -> None:
    with pytest.raises(UnsupportedOutput, match=name):
        world.model(prompt(), **{name: True})
    with pytest.raises(UnsupportedOutput, match=name):
        world.model.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True, **{name: True})
    assert not world.remote.runs


def test_continuous_batching_is_refused(world: World) -> None:
    with pytest.raises(UnsupportedOutput, match="continuous batching"):
        world.model.generate_batch([[5, 6]])


@pytest.mark.parametrize("world", ["gpt2", "llama"], indirect=True)
def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_sent(world: World) -> None:
    context = world.local.config.max_position_embeddings
    with pytest.raises(ContextTooLong, match=f"{context + 1} positions"):
        world.model.generate(prompt(tokens=context + 1), max_new_tokens=1)
    assert not world.remote.runs
    assert_logits_equal(world, prompt(tokens=context), None)


@pytest.mark.parametrize("world", ["bloom", "llama-dynamic"], indirect=True)
def test_a_model_without_bounds_takes_any_prompt(world: World) -> None:
    assert_logits_equal(world, prompt(tokens=100), None)


def test_foreign_caches_are_refused(world: World) -> None:
    with pytest.raises(UnsupportedCache, match="DynamicCache"):
        world.model(prompt(), past_key_values=DynamicCache())
    cache = world.model(prompt(2)).past_key_values
    with pytest.raises(UnsupportedCache, match="2 rows"):
        world.model(prompt(1), past_key_values=cache)
    with pytest.raises(UnsupportedCache, match="another model"):
        world_of("opt").model(prompt(2), past_key_values=cache)
    with pytest.raises(UnsupportedCache):
        copy.deepcopy(cache)
    with pytest.raises(UnsupportedCache):
        world.local(prompt(2), past_key_values=cache)
    cache.close()
    with pytest.raises(SessionClosed):
        world.model(prompt(2), past_key_values=cache)


def test_gradients_through_the_route_are_refused_and_all_else_needs_no_ceremony(world: World) -> None:
    assert torch.is_grad_enabled()
    assert not world.model(prompt()).logits.requires_grad
    embeds = world.model.get_input_embeddings()(prompt()).requires_grad_()
    with pytest.raises(UnsupportedGradient):
        world.model(inputs_embeds=embeds)
    with torch.no_grad():
        world.model(inputs_embeds=embeds)


def test_an_unknown_dtype_is_refused_by_name(world: World) -> None:
    with pytest.raises(CallerError, match="int8"):
        SwarmModelForCausalLM.from_pretrained("nowhere", remote=world.remote, dtype="int8")


def test_an_unknown_precision_is_refused_by_name(world: World) -> None:
    with pytest.raises(CallerError, match="float7"):
        SwarmModelForCausalLM.from_pretrained("nowhere", remote=world.remote, min_precision="float7")


def test_the_position_rules_of_every_family_are_learned_by_looking() -> None:
    assert world_of("opt").model._remote_layers._rules.counts_kept
    assert not world_of("llama").model._remote_layers._rules.counts_kept
    assert not world_of("bloom").model._remote_layers._rules.takes_position_ids
