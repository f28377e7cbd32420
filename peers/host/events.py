"""What a node tells people and programs: one `Event` for each thing that they may want to know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from peers.capacity import Plan
from peers.host.absence import AGAIN_S
from peers.model.catalog import Checkpoint
from peers.serving.comfort import Reason, clock_time
from peers.serving.owner import Owner
from peers.serving.reachability import RETRY_S, Verdict
from peers.transport.links import Links
from routing.errors import SwarmError, Unavailable
from routing.ids import BlockSpans
from routing.records import CLOCK_SLACK_S

logger = logging.getLogger(__name__)

CLOCK_LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that people or programs want to know: printed as one line, or as one JSON object."""

    kind: str
    fields: dict[str, object] = field(default_factory=dict)


Emit = Callable[[Event], None]


def reachability(verdict: Verdict) -> Event:
    if verdict.reached:
        return Event("reachable", {"addresses": list(verdict.reached)})
    if verdict.unasked:
        hint = f"this node asks again every {RETRY_S:.0f} s"
        return Event("reachability_unknown", {"reason": verdict.unasked, "hint": hint})
    hint = "forward the TCP port to this machine and give --announce /ip4/PUBLIC_IP/tcp/PORT; "
    hint += "until then others cannot send work here"
    return Event("unreachable", {"problems": dict(verdict.problems), "hint": hint})


def outage(problem: Unavailable | None, clock_skew_s: float | None) -> Event:
    if problem is None:
        return Event("announced")
    reason, hint = str(problem), problem.hint
    if clock_skew_s is not None and abs(clock_skew_s) > CLOCK_SLACK_S:
        reason = (
            f"this machine's clock is {abs(clock_skew_s):.0f} s {'ahead' if clock_skew_s > 0 else 'behind'}: {reason}"
        )
        hint = "set the clock, best by NTP"
    return Event("unannounced", {"reason": reason, "hint": hint})


def comfort(owner: Owner) -> Event:
    schedule, gate = owner.comfort.schedule, owner.comfort.gate
    match owner.reason:
        case Reason.SCHEDULE:
            assert schedule is not None
            resumes_at = clock_time(schedule.opens_at(owner.minute))
            return Event("paused", {"reason": "schedule", "schedule": str(schedule), "resumes_at": resumes_at})
        case Reason.LOAD:
            assert gate is not None
            percents = {
                "load_percent": round(owner.load_percent),
                "of": owner.load_of,
                "limit_percent": gate.limit_percent,
            }
            return Event("paused", {"reason": "load", **percents, "resume_percent": gate.resume_percent})
        case None:
            return Event("resumed")


def loading(checkpoint: Checkpoint, spans: BlockSpans, plan: Plan) -> Event:
    format_ = {"dtype": plan.dtype_name, "quantization": plan.quantization}
    return Event("loading", {"model": checkpoint.name, **spans.as_fields(), **format_})


def not_loaded(error: SwarmError) -> Event:
    return Event("not_loaded", {"reason": str(error), "hint": error.hint, "again_s": AGAIN_S})


async def watch_clock(links: Links, emit: Emit) -> None:
    """Say when this machine's clock begins to differ from others' by more than records bear, and when that is over."""
    wrong = False
    while True:
        await asyncio.sleep(CLOCK_LOOK_S)
        skew_s = links.clock_skew_s
        if skew_s is None or (abs(skew_s) > CLOCK_SLACK_S) == wrong:
            continue
        wrong = not wrong
        if wrong:
            hint = "set the clock, best by NTP; until then others refuse its records, and nobody new finds this node"
            emit(Event("clock_wrong", {"skew_s": round(skew_s, 1), "hint": hint}))
            logger.warning("this machine's clock is %.0f s %s", abs(skew_s), "ahead" if skew_s > 0 else "behind")
        else:
            emit(Event("clock_right"))
