"""A swarm on one machine, shown to a person: an entry node, three peers of ten blocks each, one streamed answer.

Owns the order of the show. Where lines go and how progress is drawn is decided by the caller.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from peers.model.catalog import resolve
from peers.model.progress import Progress
from peers.platform import container_cpus
from swarm import SwarmModelForCausalLM
from swarm.answers import Sampling, answer, encode_chat, load_tokenizer
from swarm.testing import LocalPeer, LocalSwarm, model_folder

MODEL = "smollm2-135m-instruct"
SPANS = ((0, 10), (10, 20), (20, 30))


def run(
    prompt: str,
    *,
    max_new_tokens: int,
    say: Callable[[str], None],
    write: Callable[[str], None],
    progress: Progress | None = None,
) -> None:
    """The whole show; nothing is left running behind it, also when interrupted. Raises SwarmError.

    `say` takes lines about what happens, `write` pieces of the answer.
    """
    model_folder(MODEL, progress=progress)
    checkpoint = resolve(MODEL)
    say(f"starting an entry node and {len(SPANS)} peers, each a process of its own (about 20 s) …")
    started_s = time.monotonic()
    cpus = min(os.cpu_count() or 2, container_cpus())
    # one session keeps one peer busy at a time, so each may use half of the cores
    with LocalSwarm(MODEL, SPANS, dtype="auto", threads=max(1, cpus // 2)) as swarm:
        for peer in swarm.peers:
            say(f"  {_name(peer)} serves blocks {peer.span} (process {peer.pid})")
        say(f"healthy after {time.monotonic() - started_s:.0f} s; join it from elsewhere with {swarm.invite}")
        with SwarmModelForCausalLM.from_pretrained(checkpoint, invite=swarm.invite) as model:
            tokenizer = load_tokenizer(checkpoint)
            say(f"\n> {prompt}\n")
            result = answer(
                model,
                tokenizer,
                encode_chat(tokenizer, [{"role": "user", "content": prompt}]),
                max_new_tokens=max_new_tokens,
                sampling=Sampling(),
                write=write,
            )
            write("\n")
            timings = result.timings
            names = {peer.peer_id: _name(peer) for peer in swarm.peers}
            hops = " → ".join(f"{names[hop.peer_id]} [{hop.span}]" for hop in model.route.hops)
            say(f"\nroute: you → {hops} → you")
            say(
                f"{timings.new_tokens} tokens; first after {timings.time_to_first_token_s:.2f} s"
                + (f", then {timings.tokens_per_s:.1f} tokens/s" if timings.tokens_per_s else "")
            )
        say("stopping everything …")
    say("done: no process is left")


def _name(peer: LocalPeer) -> str:
    return f"peer …{peer.peer_id[-6:]}"
