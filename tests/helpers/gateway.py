"""A gateway over a swarm in memory: a real HTTP server, real peers, a tiny model that writes printable bytes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swarm.gateway.app import make_app
from swarm.gateway.host import RunningGateway
from swarm.gateway.keys import Account, Keys
from swarm.gateway.served import Served
from swarm.web.server import listen
from tests.helpers.families import FAMILIES, random_model
from tests.helpers.memory_swarm import MemorySwarm

SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]
CONTEXT = 2048
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are bytes, but for the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return fast


def save_talker(folder: Path, family: str = "llama") -> Any:
    """A random checkpoint whose tokens are bytes, and the whole model. Greedily it writes printable ones for ever."""
    fast = byte_tokenizer()
    vocabulary = fast.convert_ids_to_tokens(range(len(fast)))
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = FAMILIES[family].config()
    config.vocab_size, config.max_position_embeddings = len(vocabulary), CONTEXT
    model = random_model(config)
    printable = torch.tensor([32 <= ord(token) < 127 for token in vocabulary if len(token) == 1])
    with torch.no_grad():
        model.get_output_embeddings().weight[len(SPECIAL) :][~printable] = 0
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    return model


class GatewayWorld:
    """The swarm, one model behind a gateway, and the local model that it must equal."""

    def __init__(self, folder: Path, *, latency_s: float = 0.0, **options: Any) -> None:
        self.local = save_talker(folder / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.swarm = MemorySwarm(
            folder / "model",
            [(0, 2), (2, 4)],
            cache=folder / "cache",
            cache_tokens=16384,
            page_size=16,
            latency_s=latency_s,
        )
        self.served = Served("talker", self.swarm.model(), self.tokenizer, **options)
        while self.served.engine.coverage() is None:
            pass  # what is known now is known from then on, however late this machine is

    def close(self) -> None:
        self.served.close()
        self.swarm.close()

    def greedy(self, prompt: str | Sequence[int], count: int) -> list[int]:
        """What local transformers goes on with."""
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        prompt_1T = torch.tensor([ids])
        output_1T = self.local.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return list(output_1T[0, len(ids) :].tolist())

    def text(self, prompt: str, count: int) -> str:
        return str(self.tokenizer.decode(self.greedy(prompt, count), skip_special_tokens=True))

    @property
    def held(self) -> int:
        """Sessions at the first peer."""
        return len(self.swarm.peers[0].handler.ledger)


@contextmanager
def serving(
    served: Served,
    *,
    names: Sequence[str] = (),
    accounts: Sequence[Account] = (),
    drain_s: float = 5.0,
    port: int = 0,
    **options: Any,
) -> Iterator[RunningGateway]:
    """A real server in a thread, on a port of its own unless one is named. `names`: what the model is called here."""
    models = {name: copy.copy(served) for name in names} or {served.name: served}
    for name, model in models.items():
        model.name = name
    app = make_app(models, Keys(accounts), **options)
    running = RunningGateway(models, listen("127.0.0.1", port), app, drain_s=drain_s)
    begun: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()

    async def serve() -> None:
        begun.set_result(asyncio.get_running_loop())
        await running.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield running
    finally:
        begun.result(60).call_soon_threadsafe(running.stop)
        thread.join(90)
        assert not thread.is_alive()
        running.listener.close()
