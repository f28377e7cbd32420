#!/usr/bin/env python3
"""What `scripts/bench --train` measures: fine-tuning through three real local peers against the same run here.

Curves of LoRA and of prompt tuning with the same seed and data, and what their adapters say locally; forward and
backward of 8 × 64 tokens; the same over links of 100 ms and 100 Mbit/s (a lab: Linux, root); the peers' memory while
eight train at once; how long another user's tokens take meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm, model_folder

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
SPANS = [(0, 10), (10, 20), (20, 30)]
ROWS, WIDTH = 2, 32
"""Of a batch whose loss is compared; speed is measured with 8 × 64."""
METHODS = ("lora", "prompt")
RATES = {"lora": 2e-4, "prompt": 1e-3}
"""With prompts of random numbers, or ten times as fast, runs are chaotic: a local one whose gradients are disturbed by
3e-7 of their length then differs from itself by some percent, and nothing can be compared."""
LIMIT_GB = 2
TRAINERS = 8
MUST = {
    "lora, 8 × 64: tokens/s / local": 0.8,
    "prompt, 8 × 64: tokens/s / local": 0.8,
    "lora at 100 ms and 100 Mbit/s / loopback": 0.7,
}
AT_MOST = {
    "lora: largest difference of a loss, of the local one": 0.01,
    "prompt: largest difference of a loss, of the local one": 0.01,
    "lora: loss with the saved adapter, difference": 0.01,
    "prompt: loss with the saved adapter, difference": 0.01,
    "peer memory under 8 trainers / its limit": 1.0,
    "another user's token while somebody trains / alone": 1.5,
}

Figures = dict[str, list[float]]


def measure(
    figures: Figures, curves: dict[str, Any], *, rounds: int, steps: int, threads: int, say: Callable[[str], None]
) -> None:
    """Fill in figures by name, and curves by method. `threads`: of each peer, and of this process."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL), local_files_only=True, trust_remote_code=False)
    local = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval().requires_grad_(False)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("*/README.md")))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    with LocalSwarm(MODEL, SPANS, threads=threads) as swarm, entered(swarm.initial_peers) as model:
        for method in METHODS:
            say(f"{steps} steps of {method}, local and through peers")
            curves[method], compared = compare_curves(local, model, method, rows(ids, WIDTH), steps)
            figures.update(compared)
        for method in METHODS:
            for number in range(rounds + 1):
                speeds = [step_rate(one, method, rows(ids, 64), number) for one in (local, model)]
                if number:  # the first round warms both up
                    note(figures, f"local {method}, 8 × 64: tokens/s", speeds[0])
                    note(figures, f"swarm {method}, 8 × 64: tokens/s", speeds[1])
                    note(figures, f"{method}, 8 × 64: tokens/s / local", speeds[1] / speeds[0])
            say(f"speed of {method} done")
        for _ in range(rounds):
            note(figures, "another user's token while somebody trains / alone", disturbance(swarm, model, ids))
        say("another user's tokens done")
    note(figures, "peer memory under 8 trainers / its limit", memory(rows(ids, 64), threads))
    say("memory done")
    over_links(figures, rows(ids, 64), rounds, say)


def note(figures: Figures, name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


def rows(ids: torch.Tensor, width: int) -> torch.Tensor:
    """All whole rows of so many tokens."""
    return ids[: len(ids) // width * width].view(-1, width)


def entered(initial_peers: list[str]) -> Any:
    return SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=initial_peers, dtype=torch.float32)


@contextlib.contextmanager
def tuned(model: Any, method: str, seed: int = 0) -> Iterator[Any]:
    """With a fresh adapter, the same for a seed, which is off `model` again afterwards."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, adapter(method)).train()
    try:
        yield adapted
    finally:
        if method == "lora":
            adapted.unload()
        model.eval()


def adapter(method: str) -> PeftConfig:
    if method == "lora":
        return LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"])
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=16,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Plain words about a swarm of peers that compute a language model together:",
        tokenizer_name_or_path=str(model_folder(MODEL)),
    )


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(
        input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, use_cache=False
    ).loss
    return loss


def run(model: Any, method: str, data: torch.Tensor, steps: int, output: str) -> tuple[list[float], float]:
    """Losses by step, and one of rows that were not learned; the adapter is saved."""
    held, learned, losses = data[:8], data[8:], []
    with tuned(model, method) as adapted:
        optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=RATES[method])
        for step in range(steps):
            batch = learned[torch.arange(step * ROWS, (step + 1) * ROWS) % len(learned)]
            loss = loss_of(adapted, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapted.save_pretrained(output)
        with torch.no_grad():
            return losses, loss_of(adapted.eval(), held).item()


def compare_curves(
    local: Any, model: Any, method: str, data: torch.Tensor, steps: int
) -> tuple[dict[str, list[float]], Figures]:
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        expected, _ = run(local, method, data, steps, here)
        losses, held = run(model, method, data, steps, there)
        loaded = PeftModel.from_pretrained(local, there).eval()
        with torch.no_grad():
            held_here = loss_of(loaded, data[:8]).item()
        if method == "lora":
            loaded.unload()
    furthest = max(abs(one - right) / right for one, right in zip(losses, expected, strict=True))
    return {"local": expected, "swarm": losses}, {
        f"{method}: largest difference of a loss, of the local one": [furthest],
        f"{method}: loss with the saved adapter, difference": [abs(held_here - held) / held],
    }


def step_rate(model: Any, method: str, data: torch.Tensor, seed: int) -> float:
    """Tokens per second of forward and backward of one batch of eight rows.

    Another seed is another adapter, as after an optimizer's step: peers have to be sent it.
    """
    with tuned(model, method, seed) as adapted:
        started_s = time.perf_counter()
        loss_of(adapted, data[:8]).backward()
        return data[:8].numel() / (time.perf_counter() - started_s)


def disturbance(swarm: LocalSwarm, model: Any, ids: torch.Tensor) -> float:
    """The median time between two greedy tokens while another process trains, as a multiple of that alone."""

    def token_s() -> float:
        times_s = []
        for tokens in (1, 24):  # the rest of a longer answer
            started_s = time.perf_counter()
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            prompt = ids[None, :16]
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **limits)
            times_s.append(time.perf_counter() - started_s)
        return (times_s[1] - times_s[0]) / 23

    token_s()
    alone_s = statistics.median(token_s() for _ in range(3))
    command = [sys.executable, __file__, *swarm.initial_peers]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        assert trainer.stdout.readline()  # it is under way
        meanwhile_s = statistics.median(token_s() for _ in range(3))
        trainer.stdin.close()
        trainer.stdout.read()
    return meanwhile_s / alone_s


def train_until_closed(initial_peers: list[str]) -> None:
    """The process beside a user's: it gives way to everybody on this machine, as it would be on another one."""
    os.nice(19)
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), closed.set()), daemon=True).start()
    data = torch.randint(10, 32_000, (8, 64), generator=torch.Generator().manual_seed(0))
    with entered(initial_peers) as model, tuned(model, "lora") as adapted:
        while not closed.is_set():
            loss_of(adapted, data).backward()
            print("step", flush=True)


def memory(data: torch.Tensor, threads: int) -> float:
    """The most resident memory of a peer, as a part of its limit, while eight clients train."""
    peaks: list[int] = []
    ended = threading.Event()
    with LocalSwarm(MODEL, threads=threads) as swarm, contextlib.ExitStack() as stack:
        for span in SPANS:
            swarm.add_peer(span, "--max-memory", f"{LIMIT_GB}GB", wait=False)
        for peer in swarm.peers:
            peer.wait_for("ready")
        processes = [psutil.Process(peer.pid) for peer in swarm.peers]

        def watch() -> None:
            while not ended.wait(0.1):
                peaks.append(max(process.memory_info().rss for process in processes))

        models = [stack.enter_context(entered(swarm.initial_peers)) for _ in range(TRAINERS)]
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(TRAINERS) as pool:
                list(pool.map(lambda seed: step_rate(models[seed], "lora", data, seed), range(TRAINERS)))
        finally:
            ended.set()
            watcher.join()
    return max(peaks) / (LIMIT_GB * 10**9)


def over_links(figures: Figures, data: torch.Tensor, rounds: int, say: Callable[[str], None]) -> None:
    """Speed over slow links, as a part of that over fast ones; nothing where there can be no lab.

    Each in a network of its own: TCP goes by the shortest round trip and the most bytes per second that a connection
    has met, for ten seconds and longer, so one that has known another network says nothing of this one.
    """
    from tests.lab.links import PROFILES
    from tests.lab.namespaces import why_not
    from tests.lab.network import Network
    from tests.lab.swarms import LabSwarm

    if reason := why_not():
        say(f"no slow links here: {reason}")
        return
    hosts, speeds = dict(zip("abc", SPANS, strict=True)), {}
    for name in ("loopback", "wan"):
        network = Network(["entry", *hosts, "user"], seed=1, profile=PROFILES[name])
        with network, LabSwarm(network, MODEL, hosts) as swarm:
            model = swarm.add_user("user").model
            rates = [step_rate(model, "lora", data, number) for number in range(rounds + 2)]
            speeds[name] = rates[2:]  # the first ones warm up
        say(f"links as of {name} done")
    for near, far in zip(speeds["loopback"], speeds["wan"], strict=True):
        note(figures, "lora at 100 ms and 100 Mbit/s / loopback", far / near)


if __name__ == "__main__":
    train_until_closed(sys.argv[1:])
