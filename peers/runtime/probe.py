"""How fast this peer is, how large its forwards should be and what they need, measured through the very engine that
will serve.

Owns the measurement; the engine does not know that it is being measured. Takes a second or two, and on a machine on
which single forwards take long, not many of them: each is begun only when it should end within PROBE_S of the start,
which the engine's preparation is a part of.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from peers.runtime.cost import ForwardCost, Sample, fit, token_pasts
from peers.runtime.joined import AnyEngine
from peers.runtime.sizing import WORK_TOKENS
from peers.runtime.works import Work
from peers.wire.messages import Urgency
from routing.ids import SESSION_ID_BYTES, PeerId, SessionId

PROBE_S = 9.0
PREPARATION_S = 4.0
"""Of it, the most that is waited until the engine's forwards are as fast as they will be."""
DECODE_ROWS = (1, 4, 16)
DECODE_STEPS = 4
PREFILL_TOKENS = (64, 256)
"""The second is long enough that matrices, not their start-up, are what is measured."""
TOKEN_BUDGETS = (512, 1024, 2048)
"""On an accelerator, which fewer positions do not fill. On a CPU no core is idle before."""
FORWARD_S = 0.05
"""What a forward of more than WORK_TOKENS positions may take: a step that comes meanwhile waits for its end."""
DISTURBED_SHARE = 0.1
"""Of the machine's processors; on two of them, a fifth of one."""
_OWNER = PeerId("probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    decode_s_per_block: float
    """One position of one session through one block."""
    prefill_s_per_token_block: float
    """One position of a long prompt through one block."""
    block_cost: ForwardCost
    """Of a forward through one block."""
    token_budget: int
    """Positions of the largest forward: of those sizes that are quick enough, and fit into what is set aside."""
    forward_bytes: int
    """What such a forward took of the device's memory besides weights and pool, while it ran; 0 where that cannot be
    told."""
    disturbed: bool = False
    """Whether other programs were busy meanwhile, or the engine was not prepared yet, so that this peer is faster than
    it seems."""


async def measure(engine: AnyEngine, *, room_bytes: int) -> Probe:
    """Measure a started engine that serves nobody yet. Forwards for which `room_bytes` do not suffice stay as small as
    they can be. What token budget the engine is left with is the caller's affair. Raises what `Engine.run` raises."""
    deadline_s = time.monotonic() + PROBE_S
    prepared = True
    try:
        async with asyncio.timeout(PREPARATION_S):
            await engine.prepared()
    except TimeoutError:  # it goes on meanwhile, and what is measured is soon measured again
        prepared = False
    bench = _Bench(engine, deadline_s, room_bytes if prepared else 0)
    began_s, others_s = time.monotonic(), _others_s()
    try:
        found = await bench.run()
    finally:
        bench.clear()
    capacity_s = (time.monotonic() - began_s) * (psutil.cpu_count() or 1)
    if not prepared:
        return replace(found, disturbed=True, forward_bytes=0)  # the most that was taken may be the preparation's
    return replace(found, disturbed=_others_s() - others_s > DISTURBED_SHARE * capacity_s)


class _Bench:
    """One measurement: its sessions, its deadline, and what it has found so far."""

    def __init__(self, engine: AnyEngine, deadline_s: float, room_bytes: int) -> None:
        self._engine = engine
        self._deadline_s = deadline_s
        self._room_bytes = room_bytes
        self._budgets = () if engine.model.device.type == "cpu" else TOKEN_BUDGETS
        self._urgency = Urgency.BACKGROUND
        """Of the next works. Once there were steps, longer ones come in pieces."""
        self._hidden_TH = torch.randn(
            max(*PREFILL_TOKENS, *self._budgets), engine.model.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        self._room = max(1, min(engine.model.max_positions, engine.stats().total_tokens // 2))
        """For one session; the other half of the pool is for those that decode beside it."""
        self._sessions = 0
        self._samples: list[Sample] = []

    async def run(self) -> Probe:
        blocks = self._engine.num_blocks
        first = self._session()
        await self._forward([first], 0, 1)  # allocates and warms caches
        decode_s = await self._fastest(DECODE_STEPS, [first], 0, 1)
        read_forward_bytes = _watch_memory(self._engine.model.device)
        held = await self._prefills(decode_s)
        budget, forward_bytes = await self._largest(read_forward_bytes())
        self._urgency = Urgency.INTERACTIVE
        for start in dict.fromkeys((held, 0)):
            for rows in DECODE_ROWS:
                await self._decodes(rows, start, decode_s)
        cost, long = fit(self._samples), max(PREFILL_TOKENS)
        more_s = cost.seconds(long, token_pasts(0, long)) - cost.seconds(1)
        return Probe(
            decode_s_per_block=decode_s / blocks,
            prefill_s_per_token_block=min(more_s / (long - 1), decode_s) / blocks,
            block_cost=cost.part(1 / blocks),
            token_budget=budget,
            forward_bytes=forward_bytes,
        )

    async def _prefills(self, decode_s: float) -> int:
        """Prompts of the first session, short and long, then the same behind those; returns how much it holds."""
        per_token_s, held = decode_s, 1
        for start in (0, max(PREFILL_TOKENS)):
            for tokens in PREFILL_TOKENS:
                tokens = min(tokens, self._room - start, int(self._left_s() / 3 / per_token_s))
                if tokens > 0 and held >= start:
                    per_token_s = await self._fastest(2, [_name(0)], start, tokens) / tokens
                    held = start + tokens
        return held

    async def _largest(self, forward_bytes: int) -> tuple[int, int]:
        """The token budget, and what a forward of so many positions takes, which WORK_TOKENS do in `forward_bytes`."""
        budget = WORK_TOKENS
        for tokens in self._budgets:
            within = fit(self._samples).tokens_within(FORWARD_S, most=tokens)
            if within < tokens or tokens > self._room or self._left_s() < 4 * FORWARD_S:
                break
            self._engine.set_token_budget(tokens)
            read_taken_bytes = _watch_memory(self._engine.model.device)
            seconds = await self._fastest(2, [_name(0)], 0, tokens)
            taken_bytes = max(forward_bytes, read_taken_bytes())
            if seconds > FORWARD_S or taken_bytes > self._room_bytes:
                break
            budget, forward_bytes = tokens, taken_bytes
        return budget, forward_bytes

    async def _fastest(self, times: int, sessions: Sequence[SessionId], start: int, tokens: int) -> float:
        """Whatever else the machine does only adds."""
        fastest_s = await self._forward(sessions, start, tokens)
        for _ in range(times - 1):
            if fastest_s < self._left_s() / 4:
                fastest_s = min(fastest_s, await self._forward(sessions, start, tokens))
        self._note(len(sessions), start, tokens, fastest_s)
        return fastest_s

    async def _decodes(self, rows: int, start: int, decode_s: float) -> None:
        """The fastest of some forwards of one position each of `rows` sessions that hold `start` positions."""
        engine, page = self._engine, self._engine.config.page_size
        steps = min(DECODE_STEPS, engine.model.max_positions - start)
        tokens = 2 * page if engine.packs_sessions else start + steps + page  # else forks have memory of their own
        fits = rows * tokens <= engine.stats().free_tokens and steps > 0
        if not fits or (rows > 1 and not engine.packs_sessions) or 3 * rows * decode_s > self._left_s():
            return
        sessions = [self._session() for _ in range(rows)]
        parent = (_name(0), start) if start else None
        times_s = [
            await self._forward(sessions, start + step, 1, parent=None if step else parent) for step in range(steps)
        ]
        self._note(rows, start, 1, min(times_s))
        for session in sessions:
            engine.release(session)

    async def _forward(
        self, sessions: Sequence[SessionId], start: int, tokens: int, parent: tuple[SessionId, int] | None = None
    ) -> float:
        """Seconds of one forward with that many tokens of each session."""
        works = [
            Work(
                session=session,
                owner=_OWNER,
                start=start,
                hidden=self._hidden_TH[:tokens],
                span=self._engine.model.span,
                parent=parent,
                urgency=self._urgency,
            )
            for session in sessions
        ]
        with self._engine.gathering():
            running = [asyncio.ensure_future(self._engine.run(work)) for work in works]
            await asyncio.sleep(0)  # each of them submits its work
        return max([done.compute_s for done in await asyncio.gather(*running)])

    def _note(self, rows: int, start: int, tokens: int, seconds: float) -> None:
        self._samples.append(
            Sample(tokens=rows * tokens, token_pasts=rows * token_pasts(start, tokens), seconds=seconds)
        )

    def _session(self) -> SessionId:
        self._sessions += 1
        return _name(self._sessions - 1)

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def clear(self) -> None:
        for number in range(self._sessions):
            self._engine.release(_name(number))


def _name(number: int) -> SessionId:
    return SessionId(number.to_bytes(SESSION_ID_BYTES, "big"))


def _others_s() -> float:
    """Processor time that other programs have had so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0)) - time.process_time()


def _watch_memory(device: torch.device) -> Callable[[], int]:
    """Begin to watch; the function returned says how much more memory than now was in use at some moment since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: int(torch.cuda.max_memory_allocated(device) - before)
    import resource  # not everywhere: `peers.platform` says so in words

    with suppress(OSError):  # elsewhere the peak is that of the whole life, and what fits below it goes unseen
        Path("/proc/self/clear_refs").write_text("5")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return lambda: int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
