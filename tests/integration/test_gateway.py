"""The gateway as a process of its own, over a real swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, Commands, Greedy, Observer

QUESTION = "What is the capital of France?"
KEY = "a-key-for-this-test-only"


@pytest.fixture
def client(command: Commands, swarm: LocalSwarm, observer: Observer) -> Iterator[openai.OpenAI]:
    """Of a gateway that is asked to leave afterwards, and leaves nothing behind."""
    arguments = ("gateway", MODEL, "--invite", swarm.invite, "--port", "0", "--dtype", "float32", "--json")
    with command.until_interrupted(*arguments, "--api-key", KEY) as gateway:
        url = json.loads(gateway.stdout.readline())["url"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            yield client
            assert all(observer.load(peer).sessions for peer in swarm.peers)  # the conversation is kept
    assert ("once more" in gateway.errors, "Traceback" in gateway.errors) == (True, False)
    assert all(map(observer.holds_nothing, swarm.peers))


def test_a_gateway_answers_as_swarm_generate_does_and_leaves_nothing_behind(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase, greedy: Greedy, local: Any
) -> None:
    prompt = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    ids = greedy(tuple(prompt), 8, ending=True)
    messages: Any = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].message.content == text
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text

    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == text
    with torch.no_grad():
        logits_TV = local(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :]
    for entry, expected_V in zip(entries, logits_TV.log_softmax(-1), strict=False):
        best = expected_V.topk(3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-3)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another-key-altogether").models.list()
