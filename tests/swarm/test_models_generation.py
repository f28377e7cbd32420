"""When a generation gives back what it holds, and what a session keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from swarm.errors import SessionClosed
from swarm.session.remote import RowStep
from tests.helpers.families import VOCABULARY
from tests.helpers.local_remote import World, world_of

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}
"""Token 0 in a prompt would be taken for padding."""


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = world_of(getattr(request, "param", "llama"))
    world.remote.reset()
    yield world
    world.remote.assert_clean()


def prompt(tokens: int = 7, *, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def failing_after(steps: int, error: type[BaseException]) -> Any:
    """A `before_run` that raises once `steps` batches have run."""
    left = [steps]

    def before_run(_: Sequence[RowStep]) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1

    return before_run


# Interruption


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_interrupted_generation_releases_its_sessions_at_once(
    world: World, arguments: dict[str, Any], steps: int
) -> None:
    world.remote.before_run = failing_after(steps, KeyboardInterrupt)
    try:
        world.model.generate(prompt(), max_new_tokens=8, **GREEDY, **arguments)
    except KeyboardInterrupt:
        world.remote.assert_clean()  # while the traceback still refers to the cache
    else:
        pytest.fail("nothing was interrupted")


def test_a_streamer_that_raises_ends_the_generation(world: World) -> None:
    class Full:
        def put(self, value: Tensor) -> None:
            if value.numel() == 1:
                raise BufferError

        def end(self) -> None: ...

    with pytest.raises(BufferError) as caught:
        world.model.generate(prompt(), max_new_tokens=8, streamer=Full(), **GREEDY)
    world.remote.assert_clean()
    del caught


def test_a_failed_forward_releases_the_cache_that_it_made_but_no_other(world: World) -> None:
    world.remote.before_run = failing_after(1, ConnectionError)
    cache = world.model(prompt()).past_key_values
    for arguments in ({}, {"past_key_values": cache}):
        with pytest.raises(ConnectionError) as caught:
            world.model(prompt(), **arguments)
        assert len(world.remote.open_sessions) == 1
        del caught
    world.remote.before_run = None
    ours = world.model(prompt(), past_key_values=cache).logits
    torch.testing.assert_close(ours, world.local(prompt().repeat(1, 2)).logits[:, 7:], atol=2e-5, rtol=1e-4)


def test_another_remote_model_may_run_inside_a_generation(world: World) -> None:
    other = world_of("opt")
    caches = []

    class Listener(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            caches.append(other.model(input_ids).past_key_values)
            return scores

    with world.model.session():
        world.model.generate(prompt(), max_new_tokens=3, logits_processor=LogitsProcessorList([Listener()]), **GREEDY)
        assert len(other.remote.open_sessions) == 3
    assert other.model(prompt(tokens=1), past_key_values=caches[0]).logits.shape == (1, 1, VOCABULARY)
    caches.clear()
    other.remote.assert_clean()


# Threads


def test_threads_share_one_model_without_noticing(world: World) -> None:
    prompts = [prompt(5 + seed, seed=seed) for seed in range(6)]
    expected = [world.local.generate(ids, max_new_tokens=6, **GREEDY) for ids in prompts]
    together = threading.Barrier(3)

    def generate(ids: Tensor) -> Tensor:
        together.wait(timeout=60)
        with world.model.session():
            return world.model.generate(ids, max_new_tokens=6, **GREEDY)

    with ThreadPoolExecutor(3) as pool:
        for ours, local in zip(pool.map(generate, prompts), expected, strict=True):
            assert torch.equal(ours, local)


# Sessions


@pytest.mark.parametrize("world", ["llama", "opt", "bloom"], indirect=True)
def test_a_conversation_sends_only_what_is_new(world: World) -> None:
    ids = prompt()
    with world.model.session() as session:
        for turn in range(3):
            sent = world.remote.tokens_sent
            ids = world.model.generate(ids, max_new_tokens=5, **GREEDY)
            assert torch.equal(ids, world.local.generate(ids[:, :-5], max_new_tokens=5, **GREEDY))
            assert world.remote.tokens_sent - sent == (7 if turn == 0 else 4) + 4
            assert session.length == ids.shape[1] - 1
            ids = torch.cat((ids, prompt(3, seed=turn)), dim=1)
        assert len(world.remote.open_sessions) == 1
    world.remote.assert_clean()


def test_a_session_goes_on_after_max_new_tokens(world: World) -> None:
    with world.model.session():
        ids = prompt()
        for _ in range(3):
            ids = world.model.generate(ids, max_new_tokens=3, **GREEDY)
    assert torch.equal(ids, world.local.generate(prompt(), max_new_tokens=9, **GREEDY))
    assert world.remote.tokens_sent == 7 + 8


def test_a_session_goes_back_to_where_the_new_ids_differ(world: World) -> None:
    with world.model.session() as session:
        ids = world.model.generate(prompt(), max_new_tokens=5, **GREEDY)
        ids[0, 4] = (ids[0, 4] + 1) % VOCABULARY
        sent = world.remote.tokens_sent
        ours = world.model.generate(ids, max_new_tokens=2, **GREEDY)
        assert world.remote.tokens_sent - sent == 12 - 4 + 1
        assert torch.equal(ours, world.local.generate(ids, max_new_tokens=2, **GREEDY))
        sent = world.remote.tokens_sent
        again = world.model.generate(ids[:, :6], max_new_tokens=1, **GREEDY)
        assert world.remote.tokens_sent - sent == 1
        assert torch.equal(again, world.local.generate(ids[:, :6], max_new_tokens=1, **GREEDY))
        assert session.length == 6


def test_rows_of_a_session_need_neither_the_same_padding_nor_the_same_order(world: World) -> None:
    long, short = prompt(9), prompt(4, seed=1)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 5, dtype=torch.long), short), dim=1)))
    with world.model.session():
        world.model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=4, **GREEDY)
        sent = world.remote.tokens_sent
        more = torch.cat((torch.cat((short, prompt(6, seed=2)), dim=1), torch.cat((long, prompt(1, seed=3)), dim=1)))
        ours = world.model.generate(more, max_new_tokens=4, **GREEDY)
        assert world.remote.tokens_sent - sent == 6 + 1 + 2 * 3
        assert torch.equal(ours, world.local.generate(more, max_new_tokens=4, **GREEDY))


def test_beams_samples_and_lookups_go_on_from_a_session_and_leave_one_behind(world: World) -> None:
    ids = prompt()
    for arguments in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        with world.model.session() as session:
            world.model.generate(ids, max_new_tokens=3, **GREEDY)
            sent = world.remote.tokens_sent
            longer = torch.cat((ids, prompt(2, seed=4)), dim=1)
            ours = world.model.generate(longer, max_new_tokens=6, **GREEDY, **arguments)
            assert torch.equal(ours, world.local.generate(longer, max_new_tokens=6, **GREEDY, **arguments))
            assert world.remote.runs[-1] is not None
            assert world.remote.tokens_sent - sent < 9 * 4
            again = world.model.generate(ours[:1], max_new_tokens=3, **GREEDY)
            assert torch.equal(again, world.local.generate(ours[:1], max_new_tokens=3, **GREEDY))
            assert len(world.remote.open_sessions) == 1
            assert session.length == again.shape[1] - 1


@pytest.mark.parametrize("world", ["phi3-longrope"], indirect=True)
def test_a_session_reuses_nothing_that_other_rotary_frequencies_made(world: World) -> None:
    with world.model.session():
        ids = world.model.generate(prompt(10), max_new_tokens=3, **GREEDY)
        for more in (8, 3):
            ids = torch.cat((ids, prompt(more, seed=more)), dim=1)
            ours = world.model.generate(ids, max_new_tokens=3, **GREEDY)
            assert torch.equal(ours, world.local.generate(ids, max_new_tokens=3, **GREEDY))
            ids = ours


@pytest.mark.parametrize("world", ["opt"], indirect=True)
def test_a_session_reuses_nothing_that_stood_at_other_positions(world: World) -> None:
    with world.model.session():
        for first in (0, 5):
            positions = torch.arange(first, first + 7)[None]
            ours, local = (
                model.generate(prompt(), position_ids=positions, max_new_tokens=3, **GREEDY)
                for model in (world.model, world.local)
            )
            assert torch.equal(ours, local)
    assert world.remote.tokens_sent == 2 * 9


def test_a_session_survives_an_interruption(world: World) -> None:
    with world.model.session() as session:
        ids = world.model.generate(prompt(), max_new_tokens=3, **GREEDY)
        world.remote.before_run = failing_after(2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            world.model.generate(ids, max_new_tokens=8, **GREEDY)
        world.remote.before_run = failing_after(0, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            world.model.generate(ids, max_new_tokens=8, **GREEDY)
        world.remote.before_run = None
        held, sent = session.length, world.remote.tokens_sent
        assert held >= 9
        ours = world.model.generate(ids, max_new_tokens=4, **GREEDY)
        assert torch.equal(ours, world.local.generate(ids, max_new_tokens=4, **GREEDY))
        assert world.remote.tokens_sent - sent == 4


def test_a_session_is_entered_from_other_threads_through_itself(world: World) -> None:
    with world.model.session() as session, ThreadPoolExecutor(2) as pool:
        first = session.generate(prompt(), max_new_tokens=3, **GREEDY)
        calls = [pool.submit(session.generate, first, max_new_tokens=3, **GREEDY) for _ in range(4)]
        results = [call.result() for call in calls]
        assert all(torch.equal(ids, results[0]) for ids in results)
        assert world.remote.tokens_sent == 7 + 2 + 4 * 3
    with pytest.raises(SessionClosed):
        session.generate(prompt(), max_new_tokens=1)


def test_sessions_nest_and_belong_to_one_model(world: World) -> None:
    other = world_of("opt")
    with world.model.session() as outer:
        with world.model.session() as inner, other.model.session():
            world.model.generate(prompt(), max_new_tokens=2, **GREEDY)
            assert (outer.length, inner.length) == (0, 8)
        world.model.generate(prompt(), max_new_tokens=2, **GREEDY)
        assert outer.length == 8
        assert len(world.remote.open_sessions) == 1
    other.remote.assert_clean()


def test_a_cache_returned_from_within_a_session_is_the_sessions(world: World) -> None:
    with world.model.session():
        result = world.model.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
        with pytest.raises(SessionClosed):
            world.model(prompt(), past_key_values=result.past_key_values)
        assert torch.equal(world.model.generate(result.sequences, max_new_tokens=1, **GREEDY)[:, :-1], result.sequences)


def test_inputs_without_ids_are_never_taken_for_what_is_held(world: World) -> None:
    embeds = world.model.get_input_embeddings()(prompt())
    with world.model.session():
        for _ in range(2):
            sent = world.remote.tokens_sent
            world.model.generate(inputs_embeds=embeds, max_new_tokens=1, **GREEDY)
            assert world.remote.tokens_sent - sent == 7
