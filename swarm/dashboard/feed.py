"""The view as a stream of small changes: what every reader has seen, and what comes next.

Owns one ring of messages for all readers, so that one who is slow holds up nobody and costs no memory: whoever falls
behind the ring gets everything anew. Knows no network and no clock.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from routing.ids import PeerId
from swarm.dashboard.core import Core
from swarm.dashboard.schemas import plain

RING: Final = 120
"""Messages that are kept for readers that are behind or come back: two minutes of a busy swarm."""
QUIET_S: Final = 10.0
"""A message is sent so often where nothing changed, so that readers know how old things are."""
LATEST_EVENTS: Final = 50


@dataclass(frozen=True, slots=True)
class Message:
    id: str
    kind: str
    """"snapshot" or "delta"."""
    data: str


class Feed:
    """`epoch` is another one for each process: ids of another are worth nothing."""

    def __init__(self, core: Core, *, epoch: str) -> None:
        self._core = core
        self._epoch = epoch
        self._number = 0
        self._ring: deque[Message] = deque(maxlen=RING)
        self._rows: dict[PeerId, dict[str, Any]] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._overview: dict[str, Any] = plain(core.overview(core.started_at_s))
        self._events: deque[dict[str, Any]] = deque(maxlen=LATEST_EVENTS)
        self._events_seen = 0
        self._sent_at_s = core.started_at_s
        self._snapshot: Message | None = None

    def tick(self, now_s: float) -> bool:
        """Publish what changed since the last call; whether that was anything."""
        core, overview = self._core, plain(self._core.overview(now_s))
        models = {view["model_id"]: view for view in overview["models"]}
        dirty, core.dirty = core.dirty, set()
        patches = [patch for peer in dirty if (patch := self._patch(peer)) is not None]
        forgotten = [peer for peer in dirty if core.state(peer) is None and self._rows.pop(peer, None) is not None]
        events = [plain(event) for event in core.events_after(self._events_seen)]
        self._events_seen = core.total_events
        changed = {model: view for model, view in models.items() if self._models.get(model) != view}
        gone = [model for model in self._models if model not in models]
        same = self._overview["totals"] == overview["totals"] and self._overview["problem"] == overview["problem"]
        if same and not (patches or forgotten or events or changed or gone) and now_s - self._sent_at_s < QUIET_S:
            return False
        self._overview, self._models, self._sent_at_s = overview, models, now_s
        self._events.extend(events)
        delta = {
            "now_s": overview["now_s"],
            "read_at_s": overview["read_at_s"],
            "problem": overview["problem"],
            "totals": overview["totals"],
            "peers": patches,
            "forgotten": forgotten,
            "models": list(changed.values()),
            "models_gone": gone,
            "events": events,
        }
        self._number += 1
        self._ring.append(Message(self._id, "delta", _json(delta)))
        self._snapshot = None
        return True

    def _patch(self, peer: PeerId) -> dict[str, Any] | None:
        row = self._core.row(peer)
        if row is None:
            return None
        new, old = plain(row), self._rows.get(peer)
        self._rows[peer] = new
        if old is None:
            return new
        patch = {name: value for name, value in new.items() if old[name] != value}
        return {"peer_id": peer} | patch if patch else None

    @property
    def _id(self) -> str:
        return f"{self._epoch}-{self._number}"

    def snapshot(self) -> Message:
        """Everything, as of the last message of the ring."""
        if self._snapshot is None:
            whole = {**self._overview, "peers": [*self._rows.values()], "events": [*reversed(self._events)]}
            self._snapshot = Message(self._id, "snapshot", _json(whole))
        return self._snapshot

    def after(self, last_id: str) -> list[Message]:
        """What a reader has missed whose last message was `last_id`: nothing, deltas, or a snapshot."""
        epoch, _, number = last_id.rpartition("-")
        if (
            epoch != self._epoch
            or not number.isdecimal()
            or len(number) > 15
            or not 0 <= (behind := self._number - int(number)) <= len(self._ring)
        ):
            return [self.snapshot()]
        return list(self._ring)[len(self._ring) - behind :]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
