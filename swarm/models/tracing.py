"""Watches one model generate and writes down where the time went.

Owns the clock and the hooks; what becomes of the moments is `swarm.session.timeline`'s.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routing.errors import CallerError
from routing.ids import PeerId, SessionId
from routing.routes import Hop
from swarm.session.actions import Action
from swarm.session.driver import SwarmRemote
from swarm.session.steps import PendingStep
from swarm.session.timeline import Slice, Timeline


@contextmanager
def traced(model: Any, file: Path) -> Iterator[None]:
    """Within, what `model` (a SwarmModel) does for one thread is noted; afterwards, however it ends, `file` holds it.

    Raises CallerError where the file cannot be written.
    """
    try:
        file.write_text("")
    except OSError as error:
        raise CallerError(f"{file} cannot be written: {error.strerror}", hint="give --trace another file") from error
    recorder, layers = _Recorder(), model._remote_layers
    assert isinstance(layers.remote, SwarmRemote)
    remote = layers.remote
    hooks = [
        model.register_forward_pre_hook(lambda *_: recorder.forward_begins()),
        model.register_forward_hook(lambda *_: recorder.forward_ends()),
    ]
    layers.on_route = recorder.routed
    remote.observe(recorder)
    try:
        yield
    finally:
        remote.observe(None)
        layers.on_route = None
        for hook in hooks:
            hook.remove()
        file.write_text(json.dumps(recorder.finish(), separators=(",", ":")))


class _Recorder:
    """Told by the thread that generates and by the network's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timeline = Timeline()
        self._zero_s = time.perf_counter()
        self._begun_s: float | None = None
        self._ended_s: float | None = None
        self._routed: tuple[float, float] | None = None

    def finish(self) -> dict[str, Any]:
        with self._lock:
            self._sampled(self._now_s())
            return self._timeline.as_json()

    # --- in the thread that generates ---

    def forward_begins(self) -> None:
        with self._lock:
            now_s = self._now_s()
            self._sampled(now_s)
            self._begun_s, self._routed = now_s, None

    def routed(self, start_s: float, end_s: float) -> None:
        self._routed = (start_s - self._zero_s, end_s - self._zero_s)

    def forward_ends(self) -> None:
        with self._lock:
            now_s, begun_s = self._now_s(), self._begun_s
            if begun_s is None:
                return
            inner: tuple[Slice, ...] = ()
            if self._routed is not None:
                sent_s, back_s = self._routed
                inner = (
                    Slice("embed", begun_s, sent_s),
                    Slice("peers", sent_s, back_s),
                    Slice("head", back_s, now_s),
                )
            self._timeline.client(Slice("forward", begun_s, now_s, inner))
            self._ended_s = now_s

    def _sampled(self, now_s: float) -> None:
        """What follows a forward: choosing the token, showing its text."""
        if self._ended_s is not None:
            self._timeline.client(Slice("sample", self._ended_s, now_s))
            self._ended_s = None

    # --- in the network's loop ---

    def acted(self, session: SessionId, action: Action) -> None:
        with self._lock:
            self._timeline.acted(session, action, self._now_s())

    def answered(
        self, session: SessionId, step: PendingStep, hops: Sequence[Hop], timings: Sequence[tuple[float, float]]
    ) -> None:
        with self._lock:
            known = timings if len(timings) == len(hops) else ()
            self._timeline.answered(session, step, hops, known, self._now_s())

    def lost(self, peer: PeerId) -> None:
        with self._lock:
            self._timeline.lost(peer, self._now_s())

    def _now_s(self) -> float:
        return time.perf_counter() - self._zero_s
