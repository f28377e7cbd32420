"""Real text from the real model through three processes equals local transformers."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.errors import ContextTooLong
from swarm.session import pace
from swarm.testing import LocalSwarm
from tests.integration.conftest import Greedy, Observer, driver, generate

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village between two rivers,",
    "Die Geschichte der Dampfmaschine beginnt",
    "1, 1, 2, 3, 5, 8, 13,",
)


@pytest.fixture
def nobody_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine lets a peer wait: what is counted is what a step takes, and not its repair."""
    monkeypatch.setattr(pace, "SILENCE_S_MIN", 100.0)


def test_greedy_ids_of_128_tokens_equal_local_ones_for_five_prompts_at_once(
    model: Any, local: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: generate(model, prompt, 128), prompts))
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    expected = local.generate(**batch, max_new_tokens=128, min_new_tokens=128, do_sample=False)
    assert answers == expected[:, batch.input_ids.shape[1] :].tolist()


@pytest.mark.usefixtures("nobody_is_late")
def test_peers_push_to_each_other_and_the_last_one_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, swarm: LocalSwarm
) -> None:
    before = dataclasses.replace(driver(model).traffic)
    generate(model, tuple(tokenizer(PROMPTS[0]).input_ids), 8)
    assert [hop.peer_id for hop in model.route.hops] == [peer.peer_id for peer in swarm.peers]
    # One frame left for each of the eight steps, yet all three hops computed: two pushed to the next.
    assert driver(model).traffic.steps - before.steps == 8
    assert driver(model).traffic.results - before.results == 8
    assert driver(model).traffic.relays == before.relays
    assert [timing.peer for timing in driver(model).hop_timings] == [peer.peer_id for peer in swarm.peers]
    assert all(timing.compute_s > 0 for timing in driver(model).hop_timings)


def test_a_batch_with_left_padding_equals_local(model: Any, local: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(model.generate(**batch, **options), local.generate(**batch, **options))


def test_beam_search_equals_local(model: Any, local: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tuple(tokenizer(PROMPTS[2]).input_ids)
    assert generate(model, prompt, 12, num_beams=3) == generate(local, prompt, 12, num_beams=3)


def test_sampling_with_a_seed_equals_local(model: Any, local: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tuple(tokenizer(PROMPTS[2]).input_ids)
    sampled = []
    for each in (model, local):
        torch.manual_seed(11)
        sampled.append(generate(each, prompt, 12, do_sample=True, temperature=0.8, top_k=20))
    assert sampled[0] == sampled[1]


def test_prompt_lookup_equals_greedy(model: Any, tokenizer: PreTrainedTokenizerBase, greedy: Greedy) -> None:
    prompt = tuple(tokenizer("one two three four one two three four one two").input_ids)
    assert generate(model, prompt, 16, prompt_lookup_num_tokens=4) == greedy(prompt, 16)


@pytest.mark.usefixtures("nobody_is_late")
def test_a_session_sends_only_what_is_new(model: Any, tokenizer: PreTrainedTokenizerBase, greedy: Greedy) -> None:
    first = [{"role": "user", "content": "My name is Ada. Greet me."}]
    question = tuple(encode_chat(tokenizer, first))
    with model.session() as session:
        answer = generate(model, question, 8)
        assert session.length == len(question) + 7  # the newest token is not with the peers yet
        more = (*question, *answer, *tokenizer("\nAnd now").input_ids)
        before = dataclasses.replace(driver(model).traffic)
        continued = generate(model, more, 8)
        positions = (driver(model).traffic.bytes_sent - before.bytes_sent) / 4 / model.config.hidden_size
    assert continued == greedy(more, 8)
    assert positions == len(more) + 7 - (len(question) + 7)


def test_everything_held_is_freed(model: Any, observer: Observer, swarm: LocalSwarm) -> None:
    generate(model, (1, 2, 3), 4)
    assert all(map(observer.holds_nothing, swarm.peers))


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_sent(model: Any) -> None:
    sent = driver(model).traffic.steps
    with pytest.raises(ContextTooLong, match="8192"):
        generate(model, (1,) * 8193, 1)
    assert driver(model).traffic.steps == sent
