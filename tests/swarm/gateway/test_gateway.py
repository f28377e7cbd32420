"""The gateway as its clients meet it: the `openai` package over a real socket, a swarm of real peers in memory."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import openai
import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from peers.exposition import told
from routing.ids import BlockSpan
from swarm.cli.commands import faces
from swarm.gateway.engine import Ask
from swarm.gateway.kept import KeptLimits
from swarm.gateway.keys import Account, hash_key
from swarm.gateway.sampling import Sampling
from swarm.session import driver
from swarm.session.remote import RowStep
from tests.helpers.gateway import GatewayWorld, serving
from tests.helpers.schemas import random_schema

KEYS = ["a-key-that-belongs-to-alice", "a-key-that-belongs-to-bobby"]
MONITORING = Path(__file__).parents[3] / "scripts" / "monitoring"
PROMPT = "Once upon a time there was a hive"
MODEL = "talker"
FACES = ("gateway", "dashboard")
get, post = (partial(ask, timeout=60.0) for ask in (httpx2.get, httpx2.post))
SCHEMAS = int(os.environ.get("SCHEMAS", "12"))
"""Random ones; more on request."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayWorld]:
    world = GatewayWorld(tmp_path_factory.mktemp("gateway"), max_answers=24, kept=KeptLimits(strands=6))
    yield world
    world.served.close()
    assert eventually(lambda: world.held == 0)  # also what was kept between turns
    world.close()


@pytest.fixture(scope="module")
def url(world: GatewayWorld) -> Iterator[str]:
    accounts = [Account(name=f"user-{at}", digest=hash_key(key)) for at, key in enumerate(KEYS)]
    with serving(world.served, accounts=accounts) as gateway:
        yield gateway.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    return condition()


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options})


def chat(client: openai.OpenAI, *turns: str, **options: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return client.chat.completions.create(
        model=MODEL, messages=messages, **{"max_tokens": 12, "temperature": 0, **options}
    )


# --- what is said ---


def test_greedy_text_is_that_of_local_transformers(world: GatewayWorld, client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40)
    assert whole.choices[0].text == world.text(PROMPT, 40)
    assert whole.choices[0].finish_reason == "length"
    ids = world.tokenizer(PROMPT).input_ids
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 40)
    streamed = list(complete(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in streamed[:-1]) == whole.choices[0].text
    assert streamed[-2].choices[0].finish_reason == "length"
    assert (streamed[-1].choices, streamed[-1].usage.completion_tokens) == ([], 40)
    assert complete(client, ids, max_tokens=40).choices[0].text == whole.choices[0].text


def test_a_chat_goes_through_the_checkpoints_template(world: GatewayWorld, client: openai.OpenAI) -> None:
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    expected = world.text(text, 12)
    answer = chat(client, "Hello")
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=12, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_probabilities_are_those_of_local_transformers(world: GatewayWorld, client: openai.OpenAI) -> None:
    ids = world.tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n").input_ids
    expected_TV = world.local(torch.tensor([ids + world.greedy(ids, 12)])).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
    entries = chat(client, "Hello", logprobs=True, top_logprobs=5).choices[0].logprobs.content
    assert len(entries) == 12
    for entry, expected_V in zip(entries, expected_TV, strict=True):
        best = expected_V.topk(5)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert bytes(entry.bytes).decode() == entry.token
    assert [entry.top_logprobs for entry in chat(client, "Hello", logprobs=True).choices[0].logprobs.content] == [
        []
    ] * 12
    plain = complete(client, logprobs=3).choices[0].logprobs
    assert (len(plain.tokens), [len(top) for top in plain.top_logprobs]) == (12, [3] * 12)


def test_a_stream_tells_the_way_of_every_token_to_who_asks(
    url: str, world: GatewayWorld, client: openai.OpenAI
) -> None:
    """Once for the prompt, once a token, in this order; other streams have no such field."""
    described = get(f"{url}/openapi.json").json()
    answers = described["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    schema = answers["text/event-stream"]["schema"]["properties"]["swarm"]
    peers = [peer._key.peer_id for peer in world.swarm.peers]
    for ask in (chat, complete):
        chunks = list(ask(client, "Which way?", stream=True, extra_body={"swarm": {"route": True}}))
        told = [chunk.model_extra["swarm"] for chunk in chunks if "swarm" in chunk.model_extra]
        for each in told:
            jsonschema_rs.validate(schema, each)
        steps = [step for each in told for step in each["steps"]]
        assert [step["positions"] for step in steps[1:]] == [1] * 11
        assert steps[0]["positions"] > 1
        for step in steps:
            assert [(hop["peer_id"], hop["blocks"]) for hop in step["hops"]] == [(peers[0], [0, 2]), (peers[1], [2, 4])]
            assert 0 < sum(hop["queue_s"] + hop["compute_s"] for hop in step["hops"]) <= step["total_s"]
        assert all("swarm" not in chunk.model_extra for chunk in ask(client, "Which way?", stream=True))
    with pytest.raises(openai.BadRequestError, match=r"swarm\.route is for stream"):
        chat(client, "Which way?", extra_body={"swarm": {"route": True}})


@pytest.mark.parametrize("tokens", [0, 4])
def test_an_echo_has_the_probabilities_of_the_prompt(world: GatewayWorld, client: openai.OpenAI, tokens: int) -> None:
    prompt = PROMPT * 4  # more than one piece of it is scored
    ids = world.tokenizer(prompt).input_ids
    expected_TV = world.local(torch.tensor([ids + world.greedy(ids, 4)])).logits[0].log_softmax(-1).detach()
    whole = complete(client, prompt, echo=True, logprobs=2, max_tokens=tokens, n=2)
    said = prompt + world.text(prompt, 4)[:tokens]
    assert [choice.text for choice in whole.choices] == [said] * 2
    for choice in whole.choices:
        scores = choice.logprobs
        assert "".join(scores.tokens) == choice.text
        assert [choice.text[at] for at in scores.text_offset] == scores.tokens
        assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
        assert len(scores.token_logprobs) == len(ids) + tokens
        for at, (token, logprob) in enumerate(zip(ids[1:], scores.token_logprobs[1:], strict=False)):
            assert logprob == pytest.approx(float(expected_TV[at, token]), abs=1e-3)
        best_TK = expected_TV[: len(ids) - 1 + tokens].topk(2).values.tolist()
        assert [sorted(top.values(), reverse=True) for top in scores.top_logprobs[1:]] == [
            pytest.approx(best, abs=1e-3) for best in best_TK
        ]
    chunks = list(complete(client, prompt, echo=True, logprobs=2, max_tokens=tokens, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == said
    streamed = [logprob for chunk in chunks for logprob in chunk.choices[0].logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(whole.choices[0].logprobs.token_logprobs[1:], abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="echo"):
        complete(client, max_tokens=0)


def test_what_the_checkpoint_forbids_is_not_said(
    world: GatewayWorld, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of the gateway equals that of `generate`, whatever `generation_config.json` adds."""
    usual, eos = world.greedy(PROMPT, 6), world.tokenizer.eos_token_id
    rules: list[dict[str, Any]] = [
        {"suppress_tokens": [usual[1]]},
        {"begin_suppress_tokens": [usual[0]]},
        {"bad_words_ids": [[usual[2]], usual[3:5]]},
        {"no_repeat_ngram_size": 1},
        {"forced_bos_token_id": 9, "forced_eos_token_id": eos},
        {"exponential_decay_length_penalty": (3, 3.0)},
        {"exponential_decay_length_penalty": (3, 3.0), "min_length": len(PROMPT) + 15},
        {"exponential_decay_length_penalty": (0, 9.0), "min_new_tokens": 6},
    ]
    monkeypatch.setattr(world.served, "_processes", True)
    texts = set[str]()
    for rule in rules:
        with monkeypatch.context() as patch:
            for config in (world.local.generation_config, world.served.model.generation_config):
                for name, value in rule.items():
                    patch.setattr(config, name, value)
            texts.add(complete(client, max_tokens=24).choices[0].text)
            assert complete(client, max_tokens=24).choices[0].text == world.text(PROMPT, 24), rule
    assert len(texts | {world.text(PROMPT, 24)}) > 5


def test_a_stop_sequence_is_found_across_tokens_and_never_shown(world: GatewayWorld, client: openai.OpenAI) -> None:
    text = world.text(PROMPT, 40)
    stop = text[20:24]
    expected = text[: text.index(stop)]
    whole = complete(client, max_tokens=40, stop=["never so", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    streamed = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_choices_and_prompts_are_answered_each(world: GatewayWorld, client: openai.OpenAI) -> None:
    answer = complete(client, ["The first", PROMPT], n=2, echo=True)
    texts = [f"{prompt}{world.text(prompt, 12)}" for prompt in ("The first", PROMPT)]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 48


def test_a_seed_makes_chances_repeatable_and_choices_differ(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"seed": 5, "n": 3, "temperature": 1.5, "max_tokens": 20, "top_p": 0.95}
    first, again = complete(client, **options), complete(client, **options)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len({*texts}) == 3
    assert texts != [choice.text for choice in complete(client, **{**options, "seed": 6}).choices]


def test_each_way_to_choose_a_token_is_heard(client: openai.OpenAI, world: GatewayWorld) -> None:
    greedy = world.text(PROMPT, 12)
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert complete(client, temperature=1.5, seed=1, extra_body=narrow).choices[0].text == greedy, narrow
    ids_1T = torch.tensor([world.tokenizer(PROMPT).input_ids])
    penalized_1T = world.local.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=12, repetition_penalty=3.0, pad_token_id=0
    )
    expected = world.tokenizer.decode(penalized_1T[0, ids_1T.shape[1] :])
    assert complete(client, extra_body={"repetition_penalty": 3.0}).choices[0].text == expected != greedy
    for penalty in ("presence_penalty", "frequency_penalty"):
        once = complete(client, max_tokens=60, **{penalty: 2}).choices[0].text
        assert len({*once}) > len({*world.text(PROMPT, 60)}), penalty


def test_bias_decides(client: openai.OpenAI, world: GatewayWorld) -> None:
    (token,) = world.tokenizer("Q").input_ids
    assert complete(client, logit_bias={str(token): 100}, max_tokens=3).choices[0].text == "QQQ"
    eos = world.tokenizer.eos_token_id
    ended = complete(client, logit_bias={str(eos): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)
    going_on = complete(client, logit_bias={str(eos): 100}, extra_body={"ignore_eos": True})
    assert going_on.usage.completion_tokens == 12


def test_health_names_the_blocks_that_nobody_serves_and_none_because_this_machine_is_late(
    world: GatewayWorld, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (last,) = (peer for peer in world.swarm.peers if peer.handler.served.spans.covers(BlockSpan(2, 4)))

    def health() -> tuple[str, list[list[int]]]:
        world.swarm.thread.call(world.swarm.thread.client.discovery.refresh())
        answer = get(f"{url}/health")
        assert answer.status_code == 200
        return answer.json()["status"], answer.json()["models"][MODEL]["gaps"]

    assert health() == ("ok", [])
    world.swarm.pause_peer(last.links.transport.peer_id)
    try:
        assert eventually(lambda: health() == ("degraded", [[2, 4]]))
    finally:
        world.swarm.pause_peer(last.links.transport.peer_id, False)
    assert eventually(lambda: health() == ("ok", []))
    monkeypatch.setattr(driver, "LOOK_TIMEOUT_S", 0.0)
    assert health() == ("ok", [])


# --- JSON and tools ---

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "remember", "description": "a note", "parameters": SCHEMA}}


def test_an_answer_by_schema_is_valid_or_says_that_it_was_cut(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for seed in range(4):
        answer = chat(client, "Who?", response_format=form, temperature=1, seed=seed, max_tokens=200).choices[0]
        assert answer.finish_reason == "stop"
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(answer.message.content))
    assert chat(client, "Who?", response_format=form, max_tokens=3).choices[0].finish_reason == "length"


def test_answers_by_random_schemas_are_valid_or_were_cut(client: openai.OpenAI) -> None:
    """Whatever the model would rather say; at least 95 of 100 end by themselves."""
    rngs = [random.Random(seed) for seed in range(SCHEMAS)]
    schemas = [random_schema(rng) for rng in rngs]

    def ask(seed: int) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "random", "schema": schemas[seed]}}
        return chat(client, "Answer", response_format=form, temperature=1, seed=seed, max_tokens=600).choices[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(SCHEMAS)))
    ended = [answer.finish_reason == "stop" for answer in answers]
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert sum(ended) >= 0.95 * SCHEMAS
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "length" or jsonschema_rs.is_valid(schema, json.loads(answer.message.content))


def test_a_schema_that_cannot_be_used_is_the_callers_error(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        chat(client, "Who?", response_format=form)


def test_a_forced_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "max_tokens": 200, "temperature": 1, "seed": 1}
    answer = chat(client, "Who?", tool_choice="required", **options).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name, answer.message.content) == ("tool_calls", "remember", None)
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(call.function.arguments))
    named = {"type": "function", "function": {"name": "remember"}}
    chunks = list(chat(client, "Who?", tool_choice=named, stream=True, **options))
    (delta,) = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert delta.tool_calls[0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_template_without_tools_gets_the_default_system_text(world: GatewayWorld, client: openai.OpenAI) -> None:
    plain, told = chat(client, "Who?"), chat(client, "Who?", tools=[TOOL])
    assert told.usage.prompt_tokens - plain.usage.prompt_tokens > len(json.dumps(SCHEMA))
    assert chat(client, "Who?", tools=[TOOL], tool_choice="none").usage.prompt_tokens == plain.usage.prompt_tokens


def test_another_client_library_is_at_home_here(world: GatewayWorld, url: str) -> None:
    """LangChain's: it sends fields and reads chunks in its own ways."""
    from langchain_core.messages import ToolMessage  # a second, for this test alone
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "max_retries": 0, "stream_usage": True}
    talker = ChatOpenAI(base_url=f"{url}/v1", api_key=KEYS[0], model=MODEL, **options)
    expected = world.text("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 12)
    whole = talker.invoke([("human", "Hello")])
    assert (whole.content, whole.response_metadata["finish_reason"]) == (expected, "length")
    assert whole.usage_metadata["output_tokens"] == 12
    chunks = list(talker.stream([("system", "Be brief."), ("human", "Hello")]))
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 12
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    longer = talker.model_copy(update={"max_tokens": 200})
    called = longer.bind_tools([TOOL], tool_choice="remember").invoke("Who?")
    (call,) = called.tool_calls
    assert (call["name"], jsonschema_rs.is_valid(SCHEMA, call["args"])) == ("remember", True)
    turns = ["Who?", called, ToolMessage("done", tool_call_id=call["id"])]
    assert longer.invoke(turns, max_tokens=4).content
    person = longer.with_structured_output({"title": "person", **SCHEMA}, method="json_schema").invoke("Who?")
    assert jsonschema_rs.is_valid(SCHEMA, person)


# --- conversations ---


def test_the_next_turn_computes_only_what_is_new_and_only_for_the_same_key(url: str, client: openai.OpenAI) -> None:
    first = chat(client, "How many bees live in a hive?", max_tokens=20)
    turns = ("How many bees live in a hive?", first.choices[0].message.content, "And queens?")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[1], max_retries=0) as stranger:
        assert chat(stranger, *turns).usage.prompt_tokens_details.cached_tokens == 0
    second = chat(client, *turns)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    retried = chat(client, *turns[:2], "And kings, if there are any?")
    assert retried.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert chat(client, *turns).choices[0].message.content == second.choices[0].message.content


def test_what_peers_hold_of_a_prompt_serves_only_the_key_that_sent_it(world: GatewayWorld) -> None:
    engine, prompt = world.served.engine, world.tokenizer("abcdefgh" * 40).input_ids

    async def ask(owner: str) -> int:
        """Positions that the peers held already."""
        before = engine.traffic.prefix_positions
        feed = engine.submit([Ask(prompt=prompt, max_tokens=1, sampling=Sampling(), owner=owner, keep=False)])
        assert [piece async for piece in feed]
        return engine.traffic.prefix_positions - before

    assert asyncio.run(ask("alice")) == 0
    assert asyncio.run(ask("alice")) > 0
    assert asyncio.run(ask("bobby")) == 0


def test_peers_are_asked_for_room_for_the_answer_where_the_reader_said_how_long_it_may_be(
    world: GatewayWorld, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RowStep] = []
    start = world.served.engine._remote.start

    def spy(steps: Sequence[RowStep], done: Any) -> None:
        started.extend(steps)
        start(steps, done)

    monkeypatch.setattr(world.served.engine._remote, "start", spy)
    messages: Any = [{"role": "user", "content": "How many?"}]
    for asked, expected in (({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6), ({"stop": [" ", "e", "a"]}, 0)):
        started.clear()
        said = client.chat.completions.create(model=MODEL, messages=messages, **asked)
        assert {step.expects for step in started} == {expected and said.usage.prompt_tokens + expected}


# --- many, slow and absent readers ---


def test_many_streams_at_once_share_the_head_and_each_is_right(world: GatewayWorld, client: openai.OpenAI) -> None:
    prompts = [f"{PROMPT}, number {at}" for at in range(16)]
    before = world.served.engine.counts()
    with ThreadPoolExecutor(16) as pool:
        streams = pool.map(lambda prompt: list(complete(client, prompt, stream=True)), prompts)
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    assert texts == [world.text(prompt, 12) for prompt in prompts]
    after = world.served.engine.counts()
    assert after.products - before.products < after.generated_tokens - before.generated_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_leaves_frees_its_places_and_pages(world: GatewayWorld, url: str, stream: bool) -> None:
    kept = world.served.engine.counts().kept_sessions
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1900, "n": 3, "stream": stream, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with httpx2.Client(timeout=60) as http:
        if stream:
            with http.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
                lines = response.iter_lines()  # kept: the end of the iterator ends the connection
                next(lines)
                assert eventually(lambda: world.served.engine.counts().active == 3)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post(f"{url}/v1/completions", json=body, headers=headers, timeout=0.5)
    assert eventually(lambda: world.served.engine.counts().active == 0)
    assert eventually(lambda: world.held == kept)


def test_readers_that_leave_at_any_moment_leave_nothing_behind(world: GatewayWorld) -> None:
    """Also while the first steps of forks are under way, and before a step's task has begun."""
    engine, kept = world.served.engine, world.served.engine.counts().kept_sessions
    prompt = world.tokenizer(PROMPT).input_ids

    async def leave_after(pieces: int) -> None:
        ask = Ask(prompt=prompt, max_tokens=50, sampling=Sampling(), owner="x", n=5, ignore_eos=True)
        feed = engine.submit([ask])
        reading = aiter(feed)
        for _ in range(pieces):
            await anext(reading)
        engine.cancel(feed)

    async def all_of_them() -> None:
        for pieces in (0, 1, 2, 3, 5, 8, 13):
            await asyncio.gather(*(leave_after(pieces) for _ in range(3)))
            assert await asyncio.to_thread(eventually, lambda: engine.counts().active == 0)

    asyncio.run(all_of_them())
    assert eventually(lambda: world.held == kept)
    assert engine.failure is None


def test_a_reader_that_does_not_read_makes_its_answer_wait(world: GatewayWorld) -> None:
    engine, tokens = world.served.engine, 300
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "stream": True, "logprobs": 20, "temperature": 0}
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)]
    with serving(world.served) as gateway:
        gateway.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with (
            httpx2.Client(timeout=60, transport=httpx2.HTTPTransport(socket_options=small)) as http,
            http.stream("POST", f"{gateway.url}/v1/completions", json=body) as response,
        ):
            assert eventually(lambda: engine.counts().waiting == 1)
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["text"] for line in lines) == world.text(PROMPT, tokens)


def test_overload_is_answered_with_a_time_to_try_again(world: GatewayWorld, url: str, client: openai.OpenAI) -> None:
    with complete(client, n=16, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client, n=16)
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert caught.value.code == "overloaded"
    assert eventually(lambda: world.served.engine.counts().active == 0)
    with pytest.raises(openai.BadRequestError, match="at once"):
        complete(client, ["a", "b"], n=16)


def test_the_death_of_a_peer_is_not_seen_in_the_stream(world: GatewayWorld, client: openai.OpenAI) -> None:
    world.swarm.add_peer(2, 4)
    with complete(client, n=2, max_tokens=60, stream=True) as stream:
        chunks = [next(stream) for _ in range(8)]
        world.swarm.kill_peer(world.served.model.route.hops[-1].peer_id)
        chunks += stream
    for choice in range(2):
        texts = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == choice]
        assert "".join(texts) == world.text(PROMPT, 60)


def test_whatever_happens_to_peers_while_many_streams_run_every_text_is_the_undisturbed_one(tmp_path: Path) -> None:
    """They die, fall silent, step back, return and come anew; blocks 2:4 for a moment have no holder at all."""
    world, tokens, streams = GatewayWorld(tmp_path), 32, 20
    swarm, network = world.swarm, world.swarm.network
    for span in ((0, 2), (2, 4)):
        swarm.add_peer(*span)
    ids = [peer.links.transport.peer_id for peer in swarm.peers]
    client_id = swarm.thread.client.node.transport.peer_id

    def leave_a_gap() -> None:
        swarm.kill_peer(ids[3])
        threading.Timer(0.5, swarm.pause_peer, (ids[1], False)).start()

    acts: list[Callable[[], object]] = [
        lambda: swarm.kill_peer(ids[0]),
        lambda: swarm.pause_peer(ids[1]),
        lambda: swarm.add_peer(0, 2),
        lambda: swarm.thread.post(network.partition, [ids[2]], [client_id, *ids[:2], ids[3]]),
        leave_a_gap,
        lambda: swarm.thread.post(network.partition),
    ]
    left = iter(acts)
    lock, seen = threading.Lock(), 0

    def read(client: openai.OpenAI, prompt: str) -> str:
        nonlocal seen
        text = ""
        for chunk in complete(client, prompt, max_tokens=tokens, stream=True):
            text += chunk.choices[0].text
            with lock:
                seen += 1
                if seen % (tokens * streams // (len(acts) + 2)) == 0:
                    next(left, lambda: None)()
        return text

    prompts = [f"{PROMPT}, number {at}" for at in range(streams)]
    try:
        with (
            serving(world.served) as gateway,
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
            ThreadPoolExecutor(streams) as pool,
        ):
            texts = list(pool.map(lambda prompt: read(client, prompt), prompts))
        assert next(left, None) is None, "all of it happened"
        assert world.served.engine.traffic.rebuilds >= streams
        assert texts == [world.text(prompt, tokens) for prompt in prompts]
    finally:
        world.close()


# --- keys, errors, pages ---


def test_no_key_no_answer_and_a_budget_is_a_budget(world: GatewayWorld, url: str) -> None:
    for path in ("/v1/models", "/metrics"):
        assert get(f"{url}{path}").status_code == 401
    assert get(f"{url}/health").json()["status"] == "ok"
    accounts = [Account(name="c", digest=hash_key(KEYS[0]), requests_per_minute=1)]
    with (
        serving(world.served, accounts=accounts) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEYS[0], max_retries=0) as client,
    ):
        complete(client, max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client, max_tokens=1)
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("chat/completions", {"model": MODEL}, 400, "messages"),
        ("chat/completions", {"model": "nope", "messages": [{"role": "user", "content": "x"}]}, 404, "model"),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "topp": 1}, 400, "topp"),
        (
            "chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0.type",
        ),
        ("completions", {"model": MODEL, "prompt": "x", "temperature": 9}, 400, "temperature"),
        ("completions", '"a text"', 400, "body"),
        ("completions", {"model": MODEL, "prompt": "x", "n": 0}, 400, "n"),
        ("completions", {"model": MODEL, "prompt": ""}, 400, None),
        ("completions", {"model": MODEL, "prompt": [999]}, 400, None),
        ("completions", {"model": MODEL, "prompt": "x", "max_tokens": 0}, 400, "body"),
        ("completions", {"model": MODEL, "prompt": [[1], ["a"]]}, 400, "prompt.1.0"),
        ("completions", {"model": MODEL, "prompt": "x" * 3000}, 400, None),
        ("completions", "[" * 100_000, 400, None),
        ("completions", f'{{"model": "{MODEL}", "prompt": "\\ud800"}}', 400, "prompt"),
        (
            "chat/completions",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "\ud800"}}}],
            },
            400,
            None,
        ),
        ("completions", "x" * (9 << 20), 413, None),
        ("nothing", {}, 404, None),
    ],
)
def test_errors_have_openais_shape(url: str, path: str, body: Any, status: int, param: str | None) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"authorization": f"Bearer {KEYS[0]}", "content-type": "application/json"}
    response = post(f"{url}/v1/{path}", content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stop": ["x"] * 9}, "stop: List should have at most 8 items"),
        ({"prompt": ["x"] * 65}, "prompt: List should have at most 64 items"),
        ({"stream_options": {}}, "body: stream_options are for stream: true"),
    ],
)
def test_what_was_meant_is_what_is_said_to_be_wrong(url: str, wrong: dict[str, Any], said: str) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    response = post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x", **wrong}, headers=headers)
    assert response.json()["error"]["message"].startswith(said)


def test_other_pages_may_not_ask_unless_they_were_named(world: GatewayWorld, url: str) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight = partial(httpx2.options, headers=asked, timeout=60.0)
    assert "access-control-allow-origin" not in preflight(f"{url}/v1/completions").headers
    with serving(world.served, cors_origins=("https://a.example",)) as gateway:
        answer = preflight(f"{gateway.url}/v1/completions")
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_the_page_that_describes_the_api_fetches_nothing_from_elsewhere(url: str) -> None:
    page = get(f"{url}/docs").text
    assert "swagger-ui" in page
    assert not [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith("/")]


def scraped(url: str, **headers: str) -> dict[str, float]:
    """What Prometheus would read: each sample's name, and the sum over its labels."""
    families = list(text_string_to_metric_families(get(f"{url}", headers=headers).text))
    names = [family.name for family in families]
    assert len({*names}) == len(names)
    for family in families:  # https://prometheus.io/docs/practices/naming
        assert re.fullmatch("(hiveswarm_(peer|gateway|session)|process)_[a-z_]+", family.name)
        assert family.documentation or family.name.startswith("process")
        assert not family.name.endswith(("_ms", "_count", "_total"))
    sums = Counter[str]()
    for sample in (sample for family in families for sample in family.samples):
        sums[sample.name] += sample.value
    return dict(sums)


def test_the_room_that_is_told_is_what_nobody_was_promised(
    world: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = world.swarm.peers[0]
    monkeypatch.setattr(peer.handler.ledger, "owed", lambda now_s: 100)

    async def look() -> tuple[float, float]:
        (room,) = (metric for metric in await peer.metrics()._gather() if metric.name == "hiveswarm_peer_room_tokens")
        return room.samples[0].value, peer.engine.stats().room_tokens

    told_tokens, free_tokens = world.swarm.thread.call(look())
    assert told_tokens == free_tokens - 100


def test_metrics_that_dashboards_and_alerts_name_are_told(world: GatewayWorld, url: str, client: openai.OpenAI) -> None:
    peer = world.swarm.peers[0]
    peer_metrics = world.swarm.thread.call(made(peer.metrics))
    registry = CollectorRegistry()
    registry.register(peer_metrics)
    ProcessCollector(registry=registry)
    authorization = f"Bearer {KEYS[0]}"
    with told(registry, "127.0.0.1", 0) as peer_url:
        before, users = scraped(peer_url), scraped(f"{url}/metrics", authorization=authorization)
        complete(client, "A prompt that nobody has sent before", max_tokens=8)
        after, users_after = scraped(peer_url), scraped(f"{url}/metrics", authorization=authorization)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("hiveswarm_peer_tokens_total") == len("A prompt that nobody has sent before") + 7
    assert more("hiveswarm_peer_step_seconds_count") == 8 * 3  # phases
    assert more("hiveswarm_peer_outputs_total") == 8
    assert more("hiveswarm_peer_opened_sessions_total") == 1
    assert more("hiveswarm_peer_sent_bytes_total") > more("hiveswarm_peer_tokens_total") * 4
    assert after["hiveswarm_peer_cache_pages"] == 16384 // 16
    assert after["hiveswarm_peer_state"] == after["hiveswarm_peer_info"] == 1
    assert (
        users_after["hiveswarm_gateway_generated_tokens_total"] - users["hiveswarm_gateway_generated_tokens_total"] == 8
    )
    assert users_after["hiveswarm_gateway_missing_blocks"] == 0
    told_names = {*after, *users_after, "up"}
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    queries += [rule["expr"] for rule in rules]
    assert all(rule["annotations"]["summary"] for rule in rules)
    named = {name for query in queries for name in re.findall(r"\b(?:hiveswarm|process)_\w+|\bup\b", query)}
    assert len(named) > 30
    # families with labels that only failures bring have no sample yet
    assert {name for name in named if name not in told_names} <= {
        f"hiveswarm_{what}_total" for what in ("peer_rpc_errors", "session_rpc_errors", "peer_training_refusals")
    }
    scrapes = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert scrapes["rule_files"] == ["alerts.yml"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scrapes["scrape_configs"]}
    ports = {
        "peers": 9100,
        **{face: inspect.signature(getattr(faces, face)).parameters["port"].default for face in FACES},
    }
    assert targets == {f"hiveswarm-{part}": [f"127.0.0.1:{port}"] for part, port in ports.items()}


async def made(make: Callable[[], Any]) -> Any:
    """In the event loop that runs this."""
    return make()


# --- the end ---


def test_a_gateway_that_ends_lets_answers_finish_or_says_so(world: GatewayWorld) -> None:
    def read(url: str, tokens: int, begun: threading.Event) -> str:
        text = ""
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for chunk in complete(client, max_tokens=tokens, stream=True):
                begun.set()
                text += chunk.choices[0].text
        return text

    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        with serving(world.served, drain_s=60.0) as gateway:
            answer = pool.submit(read, gateway.url, 60, begun)
            assert begun.wait(60)
        assert answer.result(60) == world.text(PROMPT, 60)
        begun = threading.Event()
        with serving(world.served, drain_s=0.1) as gateway:
            answer = pool.submit(read, gateway.url, 1900, begun)
            assert begun.wait(60)
        with pytest.raises(openai.APIError, match="has ended"):
            answer.result(60)
    assert eventually(lambda: world.served.engine.counts().active == 0)
    assert world.served.engine.failure is None
