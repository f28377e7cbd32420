"""Which blocks a peer that joins will serve, where others join at the same time.

Owns the rhythm; who goes before whom is `routing.placement`'s to decide, announcing the host's.

    look around ── choose ── announce that as an intent ── SETTLE_S ── the same choice again? ── yes: load
                     └───────────────────────── no ────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from peers.discovery import Discovery
from routing.ids import BlockSpan, ModelId
from routing.records import Announcement

logger = logging.getLogger(__name__)

SETTLE_S = 3.0
"""Long enough for intents announced at the same time to be read; up to half as much again, as all look at once else."""
MAX_ROUNDS = 8
"""By then it loads what it chose last: where so many come at once, some double others' blocks for a while."""


async def settle(
    discovery: Discovery,
    model: ModelId,
    choose: Callable[[list[Announcement]], BlockSpan],
    announce: Callable[[BlockSpan], Awaitable[None]],
    *,
    rng: random.Random,
) -> BlockSpan:
    """The span that `choose` makes of what everybody announces, when nobody who goes before chose it too.

    `announce` says what this peer intends. The first look has been taken.
    """
    span = _choice(discovery, model, choose)
    for _ in range(MAX_ROUNDS):
        await announce(span)
        await asyncio.sleep(SETTLE_S * rng.uniform(1.0, 1.5))
        await discovery.refresh()
        again = _choice(discovery, model, choose)
        if again == span:
            break
        logger.info("another peer goes to blocks %s: this one to %s", span, again)
        span = again
    return span


def _choice(discovery: Discovery, model: ModelId, choose: Callable[[list[Announcement]], BlockSpan]) -> BlockSpan:
    me = discovery.peer_id
    known = discovery.router.snapshot(discovery.now_s()).of_model(model)
    return choose([announcement for announcement in known if announcement.peer_id != me])
