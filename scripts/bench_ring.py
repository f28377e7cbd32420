"""What a hop takes at least: frames go round bare nodes that do nothing but read as many weights as a peer does.

That much of what `scripts/bench` calls the overhead per hop is the way of the bytes: Python, two daemons of libp2p and
the kernel, all of them pushed out of the processor's caches by the weights that were read since the last frame.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from peers.transport.base import Stream
from peers.transport.hivemind_p2p.node import HivemindNode, NodeConfig
from peers.transport.loop import new_event_loop
from routing.identity import SigningKey

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = "/bench-ring/1"
NOTE_BYTES = 32
"""What each node adds to a frame: the seconds for which it read weights."""
START_S, ROUND_S = 60.0, 10.0


def ring_ms(weight_bytes: int, frame_bytes: int, *, nodes: int = 3, rounds: int = 100) -> float:
    """Milliseconds per node of a frame's round through `nodes` and back, reading apart; the median."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_rounds(weight_bytes, frame_bytes, nodes, rounds))


async def _node(initial_peers: list[str]) -> HivemindNode:
    key = SigningKey.from_seed(secrets.token_bytes(32))
    return await HivemindNode.create(NodeConfig(network="ring", signing_key=key, initial_peers=tuple(initial_peers)))


async def _rounds(weight_bytes: int, frame_bytes: int, nodes: int, rounds: int) -> float:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(await _node([]))
        way: list[Any] = [[node.peer_id, list(node.addresses)]]
        for _ in range(nodes):
            arguments = [sys.executable, __file__, str(weight_bytes), *node.addresses]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            child = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, env=environment)
            stack.push_async_callback(_end, child)
            assert child.stdout is not None
            way.insert(0, json.loads(await asyncio.wait_for(child.stdout.readline(), START_S)))
        arrived: asyncio.Queue[bytes] = asyncio.Queue()
        await node.transport.serve(PROTOCOL, lambda stream: stream.each(lambda frame: arrived.put_nowait(bytes(frame))))
        (peer, addresses), *rest = way
        stream = await node.transport.open_stream(peer, addresses, PROTOCOL, timeout_s=START_S)
        await stream.send(json.dumps(rest).encode())
        frame, beyond_ms = bytes(frame_bytes), []
        for _ in range(rounds):
            started_s = time.perf_counter()
            stream.send_now(frame)
            came = await asyncio.wait_for(arrived.get(), ROUND_S)
            elapsed_s = time.perf_counter() - started_s
            notes = (came[at : at + NOTE_BYTES] for at in range(frame_bytes, len(came), NOTE_BYTES))
            beyond_ms.append((elapsed_s - sum(float(note) for note in notes)) * 1000 / nodes)
        return statistics.median(beyond_ms[rounds // 10 :])


async def _end(child: Process) -> None:
    child.terminate()
    await child.wait()


async def _serve(weight_bytes: int, initial_peers: list[str]) -> None:
    """One of the nodes: passes frames on to the next, along the way that the first frame tells."""
    weights_NK, input_K = torch.zeros(max(1, weight_bytes // 4096), 1024), torch.zeros(1024)
    node = await _node(initial_peers)

    async def pass_on(stream: Stream) -> None:
        (peer, addresses), *rest = json.loads(await stream.receive())
        behind = await node.transport.open_stream(peer, addresses, PROTOCOL, timeout_s=START_S)
        if rest:
            await behind.send(json.dumps(rest).encode())

        def each(frame: bytes | bytearray) -> None:
            started_s = time.perf_counter()
            torch.mv(weights_NK, input_K)
            behind.send_now(frame, f"{time.perf_counter() - started_s:<{NOTE_BYTES}.9f}".encode())

        await stream.each(each)

    await node.transport.serve(PROTOCOL, pass_on)
    print(json.dumps([node.peer_id, list(node.addresses)]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with asyncio.Runner(loop_factory=new_event_loop) as one:
        one.run(_serve(int(sys.argv[1]), sys.argv[2:]))
