"""The life of one `generate`, and of a session that outlives several.

Owns when the caches of a call are released: at its end, however it ends, unless they are returned to the caller or
a session keeps what they hold for the next call. Knows nothing about tokens; what the next call can reuse is found by
`swarm.models.rows`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, MutableSet
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from swarm.errors import SessionClosed
from swarm.models.cache import SwarmCache
from swarm.models.rows import Strand
from swarm.session.remote import Remote, Resilience

_generations: ContextVar[tuple[Generation, ...]] = ContextVar("generations", default=())
_sessions: ContextVar[tuple[Session, ...]] = ContextVar("sessions", default=())


@dataclass(slots=True, eq=False)
class Generation:
    """A running `generate` of `owner`."""

    owner: object
    held: list[Strand] | None = None
    """What its session holds from earlier calls."""
    caches: MutableSet[SwarmCache] = field(default_factory=weakref.WeakSet)
    """The caches it made and nobody dropped yet."""
    resilience: Resilience | None = None
    """Of its session, where that says something else than the model."""


@contextmanager
def generation(owner: object) -> Iterator[Generation]:
    """A call without a session: releases its caches, except those that the block removes from `caches`."""
    call = Generation(owner)
    with _pushed(call):
        try:
            yield call
        finally:
            for cache in list(call.caches):
                cache.close()


def current_generation(owner: object) -> Generation | None:
    """The innermost running `generate` of `owner` in this thread."""
    return next((call for call in reversed(_generations.get()) if call.owner is owner), None)


def current_session(owner: object) -> Session | None:
    """The innermost `with session:` of `owner` around this code."""
    return next((session for session in reversed(_sessions.get()) if session.owner is owner), None)


class Session:
    """Keeps what the peers hold from one `generate` to the next, until it is closed.

    The next call need not say what it continues: each of its rows starts behind the longest prefix that the session
    holds, so a conversation goes on, an edited one goes back to where it differs, and several answers share their
    question. A call that is interrupted leaves the session usable.

        with model.session():
            ids = model.generate(ids, max_new_tokens=20)

    Calls from other threads are made through the session (`session.generate`) and wait for each other.
    """

    def __init__(
        self, owner: object, remote: Remote, generate: Callable[..., Any], resilience: Resilience | None = None
    ) -> None:
        self.owner = owner
        self._resilience = resilience
        self._remote = remote
        self._generate = generate
        self._strands: list[Strand] = []
        self._lock = threading.RLock()
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens held of the longest sequence."""
        return max((len(strand.tokens) for strand in self._strands), default=0)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, in this session."""
        sessions = _sessions.get()
        token = _sessions.set((*sessions, self))
        try:
            return self._generate(*args, **kwargs)
        finally:
            _sessions.reset(token)

    @contextmanager
    def generation(self) -> Iterator[Generation]:
        """A call that starts from what is held and leaves behind what it holds at its end."""
        with self._lock:
            if self._closed:
                raise SessionClosed("this session was closed")
            call = Generation(self.owner, self._strands, set(), self._resilience)
            with _pushed(call):
                try:
                    yield call
                finally:
                    taken = [strand for cache in call.caches for strand in cache.take_strands()]
                    if taken:
                        self._remote.release([strand.session for strand in self._strands])
                        self._strands = taken

    def close(self) -> None:
        """Release everything held. Idempotent; waits for a running call."""
        with self._lock:
            self._closed = True
            self._remote.release([strand.session for strand in self._strands])
            self._strands = []

    def __enter__(self) -> Self:
        _sessions.set((*_sessions.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _sessions.set(tuple(session for session in _sessions.get() if session is not self))
        self.close()


@contextmanager
def _pushed(call: Generation) -> Iterator[None]:
    token = _generations.set((*_generations.get(), call))
    try:
        yield
    finally:
        _generations.reset(token)
