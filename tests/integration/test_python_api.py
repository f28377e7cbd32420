"""The Python API where it is used: in a running event loop, from several threads, with an assistant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from swarm.answers import Sampling, answer, encode_chat
from tests.integration.conftest import Greedy, driver, generate

BEGINNINGS = ("Once upon a time", "The capital of France is", "1, 2, 3,")


async def test_generate_works_inside_a_running_event_loop(
    model: Any, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    """As in a notebook, whose cells run in a loop."""
    prompt = tuple(tokenizer(BEGINNINGS[0]).input_ids)
    assert generate(model, prompt, 8) == greedy(prompt, 8)


def test_threads_that_share_a_model_get_their_own_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    prompts = [tuple(tokenizer(text).input_ids) for text in BEGINNINGS]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: generate(model, prompt, 12), prompts))
    assert answers == [greedy(prompt, 12) for prompt in prompts]


def test_the_second_turn_of_a_chat_sends_nothing_of_the_first(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Through the template, as `swarm chat` does it: positions sent are those behind what the peers hold."""
    chat = [{"role": "user", "content": "My name is Ada. Greet me."}]
    with model.session():
        first = encode_chat(tokenizer, chat)
        greeting = answer(model, tokenizer, first, max_new_tokens=6, sampling=Sampling(), write=lambda piece: None)
        chat += [{"role": "assistant", "content": greeting.text}, {"role": "user", "content": "What is my name?"}]
        second = encode_chat(tokenizer, chat)
        before = driver(model).traffic.bytes_sent
        named = answer(model, tokenizer, second, max_new_tokens=6, sampling=Sampling(), write=lambda piece: None)
        positions = (driver(model).traffic.bytes_sent - before) / 4 / model.config.hidden_size
    held = [*first, *greeting.token_ids[:-1]]  # the newest token is not with the peers yet
    common = next((n for n, (a, b) in enumerate(zip(held, second, strict=False)) if a != b), len(held))
    assert common >= len(first)
    assert positions == len(second) - common + len(named.token_ids) - 1


def test_an_assistant_changes_nothing_but_the_number_of_steps(
    model: Any, local: Any, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    prompt = tuple(tokenizer(BEGINNINGS[0]).input_ids)
    before = model._remote_layers.remote.traffic.steps
    assert generate(model, prompt, 20, assistant_model=local) == greedy(prompt, 20)
    assert model._remote_layers.remote.traffic.steps - before < 20


def test_parallel_samples_equal_local_ones(model: Any, local: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt_1T = tokenizer(BEGINNINGS[0], return_tensors="pt").input_ids
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    sampled = []
    for each in (model, local):
        torch.manual_seed(5)
        sampled.append(each.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **options))
    assert torch.equal(*sampled)
    assert len({tuple(row) for row in sampled[0].tolist()}) == 3
