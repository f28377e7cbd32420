"""The dashboard's HTTP face: the JSON of `schemas`, its stream, the badge, the metrics and the pages.

Owns what a request may ask for and how much of it. Reads the core, never changes it. FastAPI reads annotations as they
are, names of inner functions included: they stay no strings.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from peers.transport.links import Links
from routing.addresses import is_public, peer_id_in, validate_multiaddr
from routing.errors import CallerError, InvalidAddress, SwarmError
from routing.ids import ModelId, PeerId
from routing.version import VERSION
from swarm.dashboard import badge
from swarm.dashboard.core import Core
from swarm.dashboard.feed import Feed, Message
from swarm.dashboard.history import MAX_AGE_S, SAMPLE_S, EventQuery, History
from swarm.dashboard.join import join
from swarm.dashboard.metrics import CoreMetrics
from swarm.dashboard.reachability import look
from swarm.dashboard.schemas import (
    EventKind,
    EventList,
    Health,
    HistoryPoint,
    Join,
    Overview,
    PeerDetail,
    PeerList,
    Problem,
    Reachability,
    ReachabilityRequest,
    RouteDetail,
    Snapshot,
    State,
    Topology,
)
from swarm.dashboard.schemas import History as HistoryAnswer
from swarm.web.bodies import BoundedBodies
from swarm.web.headers import OwnPagesOnly
from swarm.web.pages import add_page
from swarm.web.streams import EventStream

MAX_BODY_BYTES: Final = 4096
MAX_READERS: Final = 128
"""Streams at once."""
SEND_TIMEOUT_S: Final = 30.0
"""A reader that takes nothing for so long has gone."""
STALE_S: Final = 60.0
"""A view that is older than this is not well."""
ASKS_PER_MINUTE: Final = 10
"""Of one address, to dial a peer; the first so many at once."""
MAX_DIALS: Final = 4
"""At once, for everybody."""
MAX_ASKERS: Final = 1024

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (400, "The request is wrong"),
        (404, "There is no such thing"),
        (429, "Asked too often; see Retry-After"),
        (503, "Not now"),
    )
}


@dataclass(slots=True, kw_only=True)
class Dashboard:
    """What the routes share."""

    core: Core
    feed: Feed
    history: History
    entrance: tuple[str, ...]
    """Addresses of entry nodes, for the invite."""
    news: Callable[[], Coroutine[Any, Any, None]]
    """Returns when the feed has something new."""
    stranger: Callable[[], AbstractAsyncContextManager[Links]]
    """Links that know nobody yet: whoever is reached by them was dialled just now. May raise SwarmError."""
    calls: Mapping[str, int] = field(default_factory=dict)
    exposed: bool = False
    """Whether others than this machine can ask."""
    clock: Callable[[], float] = time.time
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Streams end now."""
    readers: int = 0
    asks: "Asks" = field(default_factory=lambda: Asks())
    dials: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_DIALS))

    def reader_left(self) -> None:
        self.readers -= 1

    def model(self, name: str) -> ModelId:
        model = self.core.model(name)
        if model is None:
            raise HTTPException(404, f"nobody announces a model {name[:96]!r}")
        return model


class Asks:
    """How often each address asked: a bucket of ASKS_PER_MINUTE tokens, for the MAX_ASKERS that asked last."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, asker: str, now_s: float) -> float:
        """0 where it may ask, which is counted; else seconds until it may."""
        rate = ASKS_PER_MINUTE / 60
        tokens, at_s = self._buckets.pop(asker, (float(ASKS_PER_MINUTE), now_s))
        tokens = min(float(ASKS_PER_MINUTE), tokens + max(0.0, now_s - at_s) * rate)
        while len(self._buckets) >= MAX_ASKERS:
            self._buckets.popitem(last=False)
        self._buckets[asker] = (tokens - 1 if tokens >= 1 else tokens, now_s)
        return 0.0 if tokens >= 1 else (1 - tokens) / rate


def make_app(dashboard: Dashboard) -> FastAPI:
    """The application."""
    app = FastAPIOffline(
        redoc_url=None,
        title="hiveswarm dashboard",
        version=VERSION,
        description="The health of a swarm. Read-only. Ages are now_s minus …_at_s; what is not known is null.",
        exception_handlers=_handlers(),
    )
    core, feed, history = dashboard.core, dashboard.feed, dashboard.history

    @app.get("/api/v1/snapshot", response_model=None, responses={200: {"model": Snapshot}})
    async def snapshot() -> Response:
        """Everything that the stream begins with."""
        return Response(feed.snapshot().data, media_type="application/json")

    @app.get(
        "/api/v1/stream",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}, 503: ERRORS[503]},
    )
    async def stream(
        last_event_id: Annotated[str, Query(max_length=64)] = "",
        last: Annotated[str, Header(alias="Last-Event-ID", max_length=64)] = "",
    ) -> Response:
        """Server-sent events: `snapshot` first (or what was missed since the given id), then `delta` by `delta`."""
        if dashboard.readers >= MAX_READERS:
            raise HTTPException(503, "too many readers", {"Retry-After": "10"})
        dashboard.readers += 1
        return EventStream(
            _messages(dashboard, last or last_event_id), dashboard.reader_left, send_timeout_s=SEND_TIMEOUT_S
        )

    @app.get("/api/v1/overview")
    async def overview() -> Overview:
        """Network, totals and models."""
        return core.overview(dashboard.clock())

    @app.get("/api/v1/peers", responses={404: ERRORS[404]})
    async def peers(
        model: Annotated[str | None, Query(max_length=96)] = None,
        state: Annotated[list[State] | None, Query(max_length=len(State))] = None,
        q: Annotated[str, Query(max_length=96, description="A part of a peer's id or name.")] = "",
        offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> PeerList:
        """Peers by blocks."""
        now_s, wanted, words = dashboard.clock(), None, q.casefold()
        if model is not None:
            wanted = dashboard.model(model).hex
        found = [
            row
            for row in core.rows()
            if (wanted is None or row.model_id == wanted)
            and (not state or row.state in state)
            and (words in row.peer_id.casefold() or words in row.name.casefold())
        ]
        found.sort(key=lambda row: (row.model_name, row.model_id, row.spans, row.peer_id))
        return PeerList(now_s=now_s, total=len(found), peers=found[offset : offset + limit])

    @app.get("/api/v1/peers/{peer_id}", responses={404: ERRORS[404]})
    async def peer(peer_id: str) -> PeerDetail:
        """Everything about one peer."""
        detail = core.detail(peer_id, dashboard.clock())
        if detail is None:
            raise HTTPException(404, "no such peer was seen lately")
        return detail

    @app.get("/api/v1/models/{model:path}/route", responses={404: ERRORS[404], 503: ERRORS[503]})
    async def route(model: str) -> RouteDetail:
        """The way that a client here would go now, and what each hop of it takes."""
        return core.route(dashboard.model(model), dashboard.clock())

    @app.get("/api/v1/topology", responses={404: ERRORS[404]})
    async def topology(model: Annotated[str | None, Query(max_length=96)] = None) -> Topology:
        """Peers as points, and the round trips that they measured."""
        return core.topology(None if model is None else dashboard.model(model), dashboard.clock())

    @app.get("/api/v1/events")
    async def events(
        kind: Annotated[list[EventKind] | None, Query(max_length=len(EventKind))] = None,
        model: Annotated[str | None, Query(max_length=64, description="An id.")] = None,
        peer: Annotated[str | None, Query(max_length=128, description="An id.")] = None,
        q: Annotated[str, Query(max_length=96, description="Words of the text, or of a peer's id.")] = "",
        before: Annotated[int | None, Query(ge=0, lt=1 << 63)] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> EventList:
        """What happened, the newest first; up to a week, over restarts of the dashboard."""
        query = EventQuery(kinds=tuple(kind or ()), model=model, peer=peer, text=q, before=before, limit=limit + 1)
        found = await asyncio.to_thread(history.events, query)
        return EventList(now_s=dashboard.clock(), events=found[:limit], more=len(found) > limit)

    @app.get("/api/v1/history", responses={404: ERRORS[404]})
    async def past(
        model: Annotated[str | None, Query(max_length=96)] = None,
        hours: Annotated[float, Query(gt=0, le=MAX_AGE_S / 3600)] = 6.0,
        points: Annotated[int, Query(ge=2, le=2000)] = 240,
    ) -> HistoryAnswer:
        """One model (the one with most peers, unless named) over the last hours."""
        now_s = dashboard.clock()
        chosen = dashboard.model(model).hex if model is not None else next((m.model_id for m in core.models), None)
        interval_s = max(SAMPLE_S, hours * 3600 / points)
        since_s = math.floor((now_s - hours * 3600) / interval_s) * interval_s  # so that points stay where they are
        found: list[HistoryPoint] = []
        if chosen is not None:
            found = await asyncio.to_thread(history.points, chosen, since_s=since_s, interval_s=interval_s)
        return HistoryAnswer(now_s=now_s, model_id=chosen, interval_s=interval_s, points=found)

    @app.get("/api/v1/join")
    async def how_to_join() -> Join:
        """An invite, and the commands that join each model."""
        return join(core.network, dashboard.entrance, core.models)

    @app.post("/api/v1/reachability", responses={status: ERRORS[status] for status in (400, 404, 429, 503)})
    async def reachability(body: ReachabilityRequest, request: Request) -> Reachability:
        """Dial a peer from here, and say what is wrong."""
        peer_id, addresses = _asked_for(dashboard, body)
        wait_s = dashboard.asks.wait_s(request.client.host if request.client else "", time.monotonic())
        if wait_s or dashboard.dials.locked():
            raise HTTPException(429, "asked too often", {"Retry-After": str(max(1, math.ceil(wait_s)))})
        async with dashboard.dials, dashboard.stranger() as links:
            return await look(links, peer_id, addresses, record=core.record(peer_id), state=core.state(peer_id))

    @app.get("/api/v1/badge.svg", response_class=Response, responses={200: {"content": {"image/svg+xml": {}}}})
    async def image(model: Annotated[str | None, Query(max_length=96)] = None) -> Response:
        """The health of the swarm, or of one model, as an image to embed."""
        if model is None:
            drawn = badge.of_swarm(core.overview(dashboard.clock()))
        else:
            known = core.model(model)
            view = next((view for view in core.models if known is not None and view.model_id == known.hex), None)
            drawn = badge.of_model(view, model)
        return Response(drawn, media_type="image/svg+xml", headers={"Cache-Control": "max-age=30"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """The view for Prometheus."""
        return Response(CoreMetrics(core, dashboard.calls).text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the view is fresh."""
        age_s = math.inf if core.read_at_s is None else dashboard.clock() - core.read_at_s
        status = "starting" if core.read_at_s is None else "ok" if age_s < STALE_S else "stale"
        answer = Health(status=status, read_at_s=core.read_at_s, problem=core.problem)
        return JSONResponse(answer.model_dump(), 200 if status == "ok" else 503)

    add_page(app, "dashboard")
    app.add_middleware(
        BoundedBodies,
        max_bytes=MAX_BODY_BYTES,
        refuse=lambda status, text: _problem(status, text),
    )
    app.add_middleware(OwnPagesOnly)
    return app


async def _messages(dashboard: Dashboard, last_id: str) -> AsyncIterator[bytes]:
    """One reader's; all it costs is its place in the feed."""
    stopping = asyncio.create_task(dashboard.stopping.wait())
    try:
        while not stopping.done():
            for message in dashboard.feed.after(last_id):
                last_id = message.id
                yield _event(message)
            news = asyncio.create_task(dashboard.news())
            try:
                await asyncio.wait({news, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
    finally:
        stopping.cancel()


def _event(message: Message) -> bytes:
    return f"id: {message.id}\nevent: {message.kind}\ndata: {message.data}\n\n".encode()


def _asked_for(dashboard: Dashboard, body: ReachabilityRequest) -> tuple[PeerId, tuple[str, ...]]:
    """Whom to dial, and where. Raises HTTPException, InvalidAddress.

    Who asks from elsewhere may have this machine dial what the swarm itself knows, and what is public: nothing that
    only this machine's network reaches.
    """
    if (body.peer_id is None) == (body.address is None):
        raise HTTPException(400, "give either peer_id or address")
    if body.address is None:
        record = dashboard.core.record(body.peer_id or "")
        if record is None:
            raise HTTPException(404, "no such peer was seen in this swarm lately; give one of its addresses instead")
        return record.peer_id, record.addresses
    address = validate_multiaddr(body.address.strip(), need_peer_id=True)
    peer_id = peer_id_in(address)
    assert peer_id is not None
    known = dashboard.core.record(peer_id)
    if dashboard.exposed and not is_public(address) and (known is None or address not in known.addresses):
        raise InvalidAddress(
            "this dashboard dials public addresses, and those that the peer announces",
            hint="ask at a dashboard of your own: swarm dashboard",
        )
    return peer_id, (address,)


def _problem(status: int, error: str, hint: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(Problem(error=error, hint=hint).model_dump(), status, headers)


def _handlers() -> dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]:
    async def http(_: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), headers=error.headers)

    async def swarm(_: Request, error: SwarmError) -> Response:
        return _problem(400 if isinstance(error, CallerError) else 503, str(error), error.hint)

    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _problem(400, f"{where or 'body'}: {first['msg']}")

    return {HTTPException: http, SwarmError: swarm, RequestValidationError: validation}
