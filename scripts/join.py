#!/usr/bin/env python3
"""Embed a peer in a program of your own.

    python scripts/join.py smollm2-135m-instruct swarm://…

Everything runs in the event loop that you give it, beside your own tasks.
"""

import asyncio
import signal
import sys
from pathlib import Path

from peers.host.config import PeerConfig
from peers.host.events import Event
from peers.host.run import run_peer
from routing.invites import parse


def tell(event: Event) -> None:
    print(event.kind, event.fields, flush=True)


async def main(model: str, link: str) -> None:
    invite = parse(link)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    config = PeerConfig(
        model=model,
        network=invite.network,
        initial_peers=invite.bootstraps,
        identity=Path("my-peer.key"),  # made on first use; whoever has it is this peer
        num_blocks=10,  # the ten that are needed most; leave it out to serve as many as memory holds
    )
    await run_peer(config, emit=tell, stop=stop)  # until `stop` is set: then it drains and leaves


asyncio.run(main(*sys.argv[1:]))
