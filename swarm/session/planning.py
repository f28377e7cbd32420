"""Over which hops a session goes: what is asked of the router, and when a hop that works is left for a faster one.

Owns how the sessions of one model share the swarm's peers, and which of the adapters that peers host the model has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace

from peers.wire.messages import PROTOCOL_VERSION
from routing.errors import NoRoute
from routing.flow import GOLDEN
from routing.hosting import find_adapter
from routing.ids import PeerId
from routing.records import HostedAdapter
from routing.routes import Hop, Route, RouteRequest
from swarm.session.actions import NeedRoute, NeedStandbys
from swarm.session.core import SessionCore, State
from swarm.session.live import LiveSession, Sessions
from swarm.session.prompts import Prompts
from swarm.session.review import hop_to_leave, next_review_s, usual_tokens

RECONSIDER_S_MIN, RECONSIDER_S = 0.5, 5.0
"""Between two looks for a better route for a session whose steps have become slow: twice as long each time."""

EXPECTED_TOKENS_MAX = 4096
"""More of an answer is not planned for: most end long before the bound that they were given."""


class Planner:
    """Of one model's sessions; used in the network's loop."""

    def __init__(self, sessions: Sessions, prompts: Prompts, *, turn: float) -> None:
        """`turn`: in [0, 1), where to begin among peers that are about as good."""
        self._sessions = sessions
        self._prompts = prompts
        self._turn = turn

    async def route(self, session: LiveSession, core: SessionCore, need: NeedRoute) -> Route:
        """Raises CallerError, Unavailable."""
        pending = core.pending
        length = max((step.first + step.count for step in pending), default=0)
        await self._find_hosted()
        self._turn = (self._turn + GOLDEN) % 1.0
        request = replace(
            self._request(session, session.route, length),
            avoid=need.avoid,
            expected_tokens=min(session.expects, length + EXPECTED_TOKENS_MAX),
            tokens=usual_tokens([step.count for step in pending]),
            back_tokens=usual_tokens([step.count - step.want_from for step in pending]),
            keep=need.keep,
            kept=None if session.route is not None else self._prompts.kept(session, pending, length),
            spread=self._turn,
            session=core.session,
        )
        return await self._sessions.client.discovery.route(request, patience_s=need.patience_s)

    def expected(self, session: LiveSession) -> Sequence[Hop]:
        """The hops that its next steps will probably go over; none where nobody is known."""
        route = session.route or self._sessions.last_route
        if route is None:
            client = self._sessions.client
            with suppress(NoRoute):
                route = client.router.plan(self._request(session, None, 1), client.discovery.now_s())
        return () if route is None else route.hops

    def standbys(self, session: LiveSession, route: Route, need: NeedStandbys) -> list[Hop]:
        """Second peers for the hops that lack one, as far as there are any."""
        client = self._sessions.client
        request, now_s = self._request(session, route, session.length), client.discovery.now_s()
        request = replace(request, avoid=need.avoid)
        hops = (client.router.standby(request, hop, need.avoid, now_s) for hop in need.hops)
        return [hop for hop in hops if hop is not None]

    def to_leave(self, session: LiveSession, core: SessionCore) -> PeerId | None:
        """The hop without which a route is clearly faster, where it is time to look for one."""
        loop_s, client, pace = asyncio.get_running_loop().time(), self._sessions.client, session.pace
        if core.route is None or core.state is not State.READY:
            return None
        if loop_s < (session.reconsider_at_s if pace.slowed else session.review_at_s) or not pace.hops_s:
            return None
        if pace.slowed:
            session.reconsider_at_s = loop_s + min(RECONSIDER_S, RECONSIDER_S_MIN * 2.0 ** min(session.looks, 9))
            session.looks += 1
            self._sessions.client.discovery.doubt({hop.peer_id for hop in core.route.hops})
        session.review_at_s = loop_s + next_review_s(loop_s - session.began_s)
        request, now_s = self._request(session, core.route, session.length), client.discovery.now_s()
        return hop_to_leave(client.router, request, pace.hops_s, now_s, step_s=pace.usual_s(1), slowed=pace.slowed)

    def usual_s(self, session: LiveSession, core: SessionCore) -> float | None:
        """What a step like the longest under way takes over the present route: as measured or, where that is more, as
        estimated. None while nothing is estimated, as one of its peers is not to be used."""
        count, client = core.positions, self._sessions.client
        request = self._request(session, core.route, session.length)
        request = replace(request, tokens=count, back_tokens=core.wanted)
        estimated_s = client.router.route_s(request, client.discovery.now_s())
        return None if estimated_s is None else max(session.pace.usual_s(count), estimated_s)

    def replaceable(self, session: LiveSession, core: SessionCore, peers: Set[PeerId]) -> bool:
        """Whether the route could go on without these now, over others that have room."""
        client = self._sessions.client
        request = self._request(session, core.route, session.length)
        return client.router.replaceable(request, peers, client.discovery.now_s())

    def _request(self, session: LiveSession, previous: Route | None, length: int) -> RouteRequest:
        """For a step of one position, of a session of which no more is known than what it holds."""
        model = self._sessions.model
        return RouteRequest(
            model=model.model,
            num_blocks=model.num_blocks,
            bytes_per_token=model.hidden_size * 4,
            cache_tokens=length,
            protocol=PROTOCOL_VERSION,
            min_precision=model.min_precision,
            adapter=self._sessions.hosted,
            previous=previous,
        )

    async def _find_hosted(self) -> None:
        """The adapter that the model is to have, among those that peers announce. Raises CallerError, NoRoute."""
        model = self._sessions.model
        if model.adapter is None or self._sessions.hosted is not None:
            return
        if (found := self._known_hosted(model.adapter)) is None:
            await self._sessions.client.discovery.refresh()
            found = self._known_hosted(model.adapter)
        self._sessions.hosted = found
        if found is not None:
            return
        raise NoRoute(
            f"no peer hosts adapter {model.adapter} of model {model.model}",
            missing=[(0, model.num_blocks)],
            hint="`swarm status` shows which there are; host one with `swarm join MODEL --adapter NAME=FOLDER`",
        )

    def _known_hosted(self, asked: str) -> HostedAdapter | None:
        client = self._sessions.client
        snapshot = client.router.snapshot(client.discovery.now_s())
        return find_adapter(snapshot.of_model(self._sessions.model.model), asked)
