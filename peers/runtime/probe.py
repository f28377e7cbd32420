"""How fast this peer is, measured through the very engine that will serve.

Owns the measurement; the engine does not know that it is being measured. Takes about a second and a half, and never
more than three forwards once a single one takes longer than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peers.runtime.engine import Engine, Work
from routing.ids import SESSION_ID_BYTES, PeerId, SessionId

DECODE_BUDGET_S = 0.6
DECODE_STEPS_MAX = 12
PREFILL_BUDGET_S = 0.6
PREFILL_TOKENS_MAX = 128
"""Enough that matrices, not their start-up, are what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    decode_s_per_block: float
    """One position of one session through one block."""
    prefill_s_per_token_block: float
    """One position of a long prompt through one block."""


async def measure_speed(engine: Engine) -> Speed:
    """Measure a started engine that serves nobody yet. Raises what `Engine.run` raises."""
    model, session = engine.model, SessionId(bytes(SESSION_ID_BYTES))
    hidden = torch.randn(PREFILL_TOKENS_MAX, model.hidden_size, generator=torch.Generator().manual_seed(0))

    async def run(tokens: int) -> float:
        work = Work(session=session, owner=PeerId("probe"), start=0, hidden=hidden[:tokens], span=model.span)
        return (await engine.run(work)).compute_s

    try:
        await run(1)  # the first forward allocates and warms caches
        decode_s = [await run(1)]
        while sum(decode_s) < DECODE_BUDGET_S and len(decode_s) < DECODE_STEPS_MAX:
            decode_s.append(await run(1))
        fastest_s = min(decode_s)  # whatever else the machine does only adds
        room = min(PREFILL_TOKENS_MAX, model.max_positions, engine.stats().total_tokens)
        tokens = max(1, min(room, int(PREFILL_BUDGET_S / fastest_s)))
        prefill_s = await run(tokens)
    finally:
        engine.release(session)
    return Speed(
        decode_s_per_block=fastest_s / len(model.span),
        prefill_s_per_token_block=min(prefill_s / tokens, fastest_s) / len(model.span),
    )
