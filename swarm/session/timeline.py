"""What happened to sessions, as a trace that Perfetto and chrome://tracing show. Pure: the clock is an argument.

Owns the tracks and how a step's time is laid out on them. A hop says how long a step waited and was computed there, not
when; what these leave of the step's time was spent between hops, and is shared out equally to the ways between them.
Nothing of prompts or answers comes in here.

The format: Trace Event Format (Google, "Complete Events" and "Instant Events").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.tally import kind_of
from routing.ids import PeerId, SessionId, StepId
from routing.routes import Hop, Route
from swarm.session.actions import Action, Fail, NeedRoute, OpenHops, Release, SendStep, Wait
from swarm.session.steps import PendingStep

MAX_SLICES = 200_000
"""Some 60 MB of JSON. What comes later is counted, not kept."""
CLIENT, ROUTE, NETWORK = "client", "route", "steps"


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took a time; `inner` lies within it, in order."""

    name: str
    start_s: float
    end_s: float
    inner: tuple[Slice, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shown:
    track: str
    slice: Slice
    arguments: dict[str, Any]


class Timeline:
    """Grows with what is told, in any order of times."""

    def __init__(self) -> None:
        self.dropped = 0
        self._shown: list[_Shown] = []
        self._instants: list[tuple[float, str]] = []
        self._tracks = [CLIENT, ROUTE, NETWORK]
        self._sent: dict[tuple[SessionId, StepId], float] = {}
        self._phases: dict[SessionId, tuple[str, float, Route | None]] = {}
        """What each session without an open route waits for, and since when."""

    def client(self, slice_: Slice, **arguments: Any) -> None:
        """Something that this program did itself."""
        self._show(CLIENT, slice_, arguments)

    def acted(self, session: SessionId, action: Action, at_s: float) -> None:
        """A session's core decided this."""
        match action:
            case NeedRoute():
                self._phase(session, "plan", at_s)
            case OpenHops():
                self._phase(session, "open", at_s, action.route)
            case Wait():
                self._phase(session, "wait", at_s)
            case SendStep():
                self._phase(session, None, at_s)
                self._sent[session, action.step.step] = at_s
            case Release():
                self._instant(f"close {', '.join(_name(hop) for hop in action.hops)}", at_s)
            case Fail():
                self._phase(session, None, at_s)
                self._sent = {step: at for step, at in self._sent.items() if step[0] != session}

    def answered(
        self,
        session: SessionId,
        step: PendingStep,
        hops: Sequence[Hop],
        timings: Sequence[tuple[float, float]],
        at_s: float,
    ) -> None:
        """`timings`: seconds in the queue and of compute that each of `hops` claims; none where that is not known."""
        start_s = self._sent.pop((session, step.step), None)
        if start_s is None:
            return
        kind = "replay" if step.replay else kind_of(step.count)
        arguments = {"session": str(session), "step": step.step, "first": step.first, "count": step.count}
        whole, parts = lay_out(kind, hops if timings else (), timings, start_s, at_s)
        self._show(NETWORK, whole, arguments)
        for hop, part in zip(hops, parts, strict=False):
            self._show(_name(hop), part, arguments)

    def lost(self, peer: PeerId, at_s: float) -> None:
        """A hop failed."""
        self._instant(f"lost …{peer[-8:]}", at_s)

    def as_json(self) -> dict[str, Any]:
        """The whole trace."""
        events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "swarm"}}]
        thread = 0
        for track in self._tracks:
            shown = sorted((one for one in self._shown if one.track == track), key=lambda one: one.slice.start_s)
            for number, lane in enumerate(lanes(shown) or [[]]):
                thread += 1
                name = track if not number else f"{track} ({number + 1})"
                place = {"pid": 1, "tid": thread}
                events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
                events.append({"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": thread}})
                for one in lane:
                    events += _complete(one.slice, place, one.arguments)
                if track == ROUTE and not number:
                    events += [
                        {"ph": "i", "s": "p", "name": text, "ts": _microseconds(at_s), **place}
                        for at_s, text in self._instants
                    ]
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"dropped": self.dropped}}

    def _phase(self, session: SessionId, name: str | None, at_s: float, route: Route | None = None) -> None:
        before = self._phases.pop(session, None)
        if before is not None:
            arguments = {"session": str(session)}
            if before[2] is not None:
                arguments["route"] = " → ".join(map(_name, before[2].hops))
            self._show(ROUTE, Slice(before[0], before[1], at_s), arguments)
        if name is not None:
            self._phases[session] = (name, at_s, route)

    def _show(self, track: str, slice_: Slice, arguments: dict[str, Any]) -> None:
        if len(self._shown) >= MAX_SLICES:
            self.dropped += 1
            return
        if track not in self._tracks:
            self._tracks.append(track)
        self._shown.append(_Shown(track, slice_, arguments))

    def _instant(self, text: str, at_s: float) -> None:
        if len(self._instants) < MAX_SLICES:
            self._instants.append((at_s, text))


def lay_out(
    name: str, hops: Sequence[Hop], timings: Sequence[tuple[float, float]], start_s: float, end_s: float
) -> tuple[Slice, list[Slice]]:
    """The step with the ways between hops, and its part at each hop with queue and compute.

    All of them together take as long as the step. Where hops claim more than that, they are scaled down to it.
    """
    total_s, claimed_s = end_s - start_s, sum(queue_s + compute_s for queue_s, compute_s in timings)
    scale = min(1.0, total_s / claimed_s) if claimed_s > 0 else 1.0
    way_s = max(0.0, total_s - claimed_s) / (len(hops) + 1)
    ways, parts, at_s = [], [], start_s
    for hop, (queue_s, compute_s) in zip(hops, timings, strict=True):
        arrived_s = min(end_s, at_s + way_s)
        begun_s = min(end_s, arrived_s + scale * queue_s)
        done_s = min(end_s, begun_s + scale * compute_s)
        ways.append(Slice(f"to {hop.span}", at_s, arrived_s))
        parts.append(
            Slice(name, arrived_s, done_s, (Slice("queue", arrived_s, begun_s), Slice("compute", begun_s, done_s)))
        )
        at_s = done_s
    ways.append(Slice("back", at_s, end_s))
    return Slice(name, start_s, end_s, tuple(ways)), parts


def lanes(shown: Iterable[_Shown]) -> list[list[_Shown]]:
    """Such that nothing overlaps within one, and as few as can be. `shown`: by their starts."""
    result: list[list[_Shown]] = []
    for one in shown:
        start = _microseconds(one.slice.start_s)
        lane = next((lane for lane in result if _microseconds(lane[-1].slice.end_s) <= start), None)
        if lane is None:
            result.append(lane := [])
        lane.append(one)
    return result


def _complete(slice_: Slice, place: dict[str, int], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Ends are rounded, not durations, so that what lies within another slice still does."""
    start, end = _microseconds(slice_.start_s), _microseconds(slice_.end_s)
    event = {"ph": "X", "name": slice_.name, "ts": start, "dur": end - start, **place, "args": arguments}
    return [event, *(inner for part in slice_.inner for inner in _complete(part, place, {}))]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _name(hop: Hop) -> str:
    return f"{hop.span} …{hop.peer_id[-8:]}"
