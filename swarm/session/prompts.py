"""What of a session's text hops may hold already, and by which keys they know it.

Owns when a route is remembered for a prompt. What a key commits to is `prefix`'s, the memory `kept`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from peers.wire.messages import PREFIX_POSITIONS
from routing.routes import Hop, Kept
from swarm.session.actions import OpenHops
from swarm.session.live import LiveSession, Sessions
from swarm.session.prefix import describe_blocks, prefix_keys
from swarm.session.review import usual_saving
from swarm.session.steps import PendingStep


class Prompts:
    """Of the sessions of one model."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def offer(self, session: LiveSession, action: OpenHops) -> list[tuple[bytes, ...]]:
        """The keys to offer, for each hop of the route."""
        blocks = self._blocks(session, action.offer)
        session.offered = max(len(blocks) * PREFIX_POSITIONS, *action.keep)
        return [
            self._keys(session, action.route.hops[:index], blocks) if action.forgot or not keep else ()
            for index, keep in enumerate(action.keep)
        ]

    def kept(self, session: LiveSession, pending: Sequence[PendingStep], length: int) -> Kept | None:
        """Where a session before this one had the longest part of its prompt."""
        session.prompt_keys = self._keys(session, (), self._blocks(session, length))
        count, hops = self._sessions.kept.find(session.prompt_keys)
        saves = usual_saving([step.count for step in pending], count * PREFIX_POSITIONS)
        return Kept(hops=hops, saves=saves) if count else None

    def answered(self, session: LiveSession) -> None:
        """A step was: its route holds the prompt."""
        if session.prompt_keys and session.route is not None:
            self._sessions.kept.add(session.prompt_keys, session.route.hops)
            session.prompt_keys = ()

    def ended(self, session: LiveSession) -> None:
        """The session is over: its route holds all of its text, if anything was answered."""
        if session.route is not None and not session.prompt_keys:
            keys = self._keys(session, (), self._blocks(session, session.length))
            self._sessions.kept.add(keys, session.route.hops)

    def _blocks(self, session: LiveSession, end: int) -> list[bytes]:
        """What the positions before `end` are, for their keys."""
        regime_key = self._sessions.model.regime_key
        return describe_blocks(session.history.between(0, end, regime_key), regime_key)

    def _keys(self, session: LiveSession, upstream: Sequence[Hop], blocks: Sequence[bytes]) -> tuple[bytes, ...]:
        model, adapter = self._sessions.model.model, self._sessions.adapter_of(session)
        return prefix_keys(session.prefix_secret, model, session.dtype, upstream, blocks, adapter)
