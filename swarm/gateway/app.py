"""The gateway's HTTP face: routes, keys, limits, streams.

Owns what a request meets in order: its body's bound, its key, its budget, its schema, a place among the answers. Knows
engines, and no network. FastAPI reads annotations as they are, names of inner functions included: they stay no strings.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from routing.errors import CallerError, SwarmError
from routing.version import VERSION
from swarm.gateway.answers import ChatFormat, Format, TextFormat, event
from swarm.gateway.engine import Ask
from swarm.gateway.errors import ApiError, from_swarm, from_validation
from swarm.gateway.feed import Feed
from swarm.gateway.keys import Account, Keys
from swarm.gateway.metrics import Counted, Metrics
from swarm.gateway.schemas import (
    AnyJson,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    Health,
    JsonAsDescribed,
    ModelCard,
    ModelList,
    ModelState,
    NamedTool,
    event_stream,
)
from swarm.gateway.schemas import Request as AnyRequest
from swarm.gateway.served import Served
from swarm.gateway.tools import call_schema
from swarm.web.bodies import BoundedBodies
from swarm.web.headers import OwnPagesOnly
from swarm.web.pages import add_page
from swarm.web.streams import EventStream

MAX_BODY_BYTES = 8 << 20
MAX_SCORED_TOKENS = 16_384
"""Of one request's prompts: the hidden states of all of them wait here to be scored."""
SEND_TIMEOUT_S = 60.0
"""A reader that takes nothing for so long has gone."""
CLOSED_REQUEST = 499
"""What nginx calls a reader that left; nobody sees it but the metrics."""

T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in (
        (400, "The request is wrong"),
        (401, "No API key, or one that is not known"),
        (404, "No such model"),
        (408, "The body came too slowly"),
        (413, "The body is too long"),
        (429, "All places are taken, or this key's budget is; see Retry-After"),
        (503, "Nobody can answer now"),
    )
}


@dataclass(slots=True)
class Gateway:
    """What the routes share."""

    served: Mapping[str, Served]
    keys: Keys
    metrics: Metrics
    stopping: bool = False
    """No new answers are begun."""

    def model(self, name: str) -> Served:
        if name not in self.served:
            known = ", ".join(self.served)
            raise ApiError(404, f"no model {name!r}; there is {known}", param="model", code="model_not_found")
        return self.served[name]

    def account(self, request: Request) -> Account:
        account = self.keys.find(request.headers.get("authorization"))
        if account is None:
            raise ApiError(401, "this gateway needs an API key that it knows", code="invalid_api_key")
        return account

    def paying(self, request: Request) -> Account:
        """The account, if it may ask now."""
        account = self.account(request)
        if self.stopping:
            raise ApiError(503, "the gateway is about to end", code="unavailable", retry_after_s=30)
        wait_s = account.wait_s(time.monotonic())
        if wait_s:
            raise ApiError(429, "too many requests with this key", code="rate_limit_exceeded", retry_after_s=wait_s)
        return account


def make_app(served: Mapping[str, Served], keys: Keys, *, cors_origins: tuple[str, ...] = ()) -> FastAPI:
    """The application; `app.state.gateway` is its Gateway. `served`: by the names that clients use."""
    gateway = Gateway(served, keys, Metrics(served))
    app = FastAPIOffline(  # the page at /docs with what it needs: nothing is fetched from elsewhere
        redoc_url=None,
        title="hiveswarm gateway",
        version=VERSION,
        description="Large language models run by a swarm of peers, through the API that OpenAI's clients speak. "
        "Peers can read what you send.",
        exception_handlers=_handlers(),
    )
    app.state.gateway = gateway
    bearer = Security(HTTPBearer(auto_error=False, description="An API key, where the gateway needs one"))

    async def known(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, bearer]) -> Account:
        return gateway.account(request)

    async def paying(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, bearer]) -> Account:
        return gateway.paying(request)

    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=[Depends(known)])
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(object="list", data=[_card(each) for each in served.values()])

    @app.get("/v1/models/{model:path}", responses={401: ERRORS[401], 404: ERRORS[404]}, dependencies=[Depends(known)])
    async def model(model: str) -> ModelCard:
        """One model."""
        return _card(gateway.model(model))

    @app.post("/v1/chat/completions", response_model=None, responses={200: _either(ChatCompletion), **ERRORS})
    async def chat(body: ChatRequest, request: Request, account: Annotated[Account, Depends(paying)]) -> Response:
        """The next turn of a conversation; with `stream`, server-sent events of `chat.completion.chunk`."""
        return await _answer(gateway, request, body, await asyncio.to_thread(_prepare_chat, gateway, body, account))

    @app.post("/v1/completions", response_model=None, responses={200: _either(Completion), **ERRORS})
    async def complete(
        body: CompletionRequest, request: Request, account: Annotated[Account, Depends(paying)]
    ) -> Response:
        """How a text goes on; with `stream`, server-sent events of `text_completion`."""
        return await _answer(gateway, request, body, await asyncio.to_thread(_prepare_text, gateway, body, account))

    @app.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """Whether the gateway works, and which blocks of its models nobody serves, without a key.

        With gaps it is `degraded`, which is no failure of this process: it answers again once a peer fills them.
        """
        models = await asyncio.to_thread(lambda: {name: _health(each) for name, each in served.items()})
        states = [
            ("stopping", gateway.stopping),
            ("failed", any(model.error is not None for model in models.values())),
            ("degraded", any(model.gaps for model in models.values())),
        ]
        status = next((name for name, holds in states if holds), "ok")
        health = Health.model_validate({"status": status, "models": models})
        return JSONResponse(health.model_dump(), 200 if status in ("ok", "degraded") else 503)

    @app.get("/metrics", response_model=None, responses={401: ERRORS[401]}, dependencies=[Depends(known)])
    async def metrics() -> Response:
        """Counters for Prometheus. Where there are API keys, it needs one."""
        return Response(await asyncio.to_thread(gateway.metrics.text), media_type=CONTENT_TYPE_LATEST)

    add_page(app, "chat")
    app.add_middleware(
        BoundedBodies,
        max_bytes=MAX_BODY_BYTES,
        refuse=lambda status, text: ApiError(status, text).response(),
    )
    app.add_middleware(OwnPagesOnly)
    app.add_middleware(Counted, requests=gateway.metrics.requests)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _either(whole: type[BaseModel]) -> dict[str, Any]:
    return {"model": whole, "content": {"text/event-stream": event_stream()}}


# --- from a request to what is asked of an engine ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    served: Served
    asks: list[Ask]
    format: Format


def _prepare_chat(gateway: Gateway, body: ChatRequest, account: Account) -> _Prepared:
    served = gateway.model(body.model)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or () if body.tool_choice != "none"]
    forced = tools if body.tool_choice == "required" else []
    named = isinstance(body.tool_choice, NamedTool)
    if isinstance(body.tool_choice, NamedTool):
        forced = [tool for tool in tools if tool["function"]["name"] == body.tool_choice.function.name]
    grammar = None
    if forced:
        grammar = served.grammars.json(call_schema(forced))
    elif isinstance(body.response_format, AnyJson):
        grammar = served.grammars.json({"type": "object"})
    elif isinstance(body.response_format, JsonAsDescribed):
        schema = body.response_format.json_schema.schema_
        grammar = served.grammars.json({"type": "object"} if schema is None else schema)
    prompt = served.encode_chat(body.messages, tools)
    asked = body.max_completion_tokens or body.max_tokens
    choices, room = body.n or 1, served.room(prompt, asked)
    ask = Ask(
        prompt=prompt,
        max_tokens=room,
        sampling=served.sampling(body),
        processors=served.processors(prompt, room),
        owner=account.name,
        expects=0 if asked is None else room,
        n=choices,
        stops=body.stops,
        ignore_eos=body.ignore_eos,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        decode=served.decode_calls if tools else None,
        grammar=grammar,
        traversals=body.wants_route,
    )
    form = ChatFormat(
        served,
        prompt_tokens=len(prompt),
        include_usage=body.wants_usage,
        choices=choices,
        logprobs=bool(body.logprobs),
        tools=[tool["function"]["name"] for tool in forced or tools] if tools else None,
        forced=bool(forced),
        named=named,
    )
    return _Prepared(served=served, asks=[ask], format=form)


def _prepare_text(gateway: Gateway, body: CompletionRequest, account: Account) -> _Prepared:
    served = gateway.model(body.model)
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    given = cast("list[str | list[int]]", [body.prompt] if one else body.prompt)
    choices = body.n or 1
    prompts = [served.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    echoes = [prompt if isinstance(prompt, str) else served.decode(prompt) for prompt in given]
    sampling = served.sampling(body)
    scored = bool(body.echo) and body.logprobs is not None
    if scored and sum(map(len, prompts)) > MAX_SCORED_TOKENS:
        raise CallerError(
            f"one request has at most {MAX_SCORED_TOKENS} tokens of prompts scored",
            hint="ask for fewer, or leave out echo",
        )
    rooms = [served.room(prompt, 16 if body.max_tokens is None else body.max_tokens) for prompt in prompts]
    asks = [
        Ask(
            prompt=prompt,
            max_tokens=room,
            sampling=sampling,
            processors=served.processors(prompt, room),
            owner=account.name,
            expects=room,
            n=choices,
            first_choice=at * choices,
            stops=body.stops,
            ignore_eos=body.ignore_eos,
            logprobs=body.logprobs,
            traversals=body.wants_route,
            scores_prompt=scored,
        )
        for at, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
    ]
    form = TextFormat(
        served,
        prompt_tokens=sum(map(len, prompts)),
        include_usage=body.wants_usage,
        echoes=[
            (echo if body.echo else "", prompt[0] if scored else None)
            for echo, prompt in zip(echoes, prompts, strict=True)
            for _ in range(choices)
        ],
        logprobs=body.logprobs is not None,
    )
    return _Prepared(served=served, asks=asks, format=form)


# --- answers ---


async def _answer(gateway: Gateway, request: Request, body: AnyRequest, prepared: _Prepared) -> Response:
    engine = prepared.served.engine
    feed = engine.submit(prepared.asks)
    gateway.metrics.prompt_tokens.labels(prepared.served.name).inc(prepared.format.totals.prompt)
    pieces = _watched(gateway, prepared.served, feed)
    if body.stream:
        events = _events(pieces, prepared.format)
        return EventStream(events, lambda: engine.cancel(feed), send_timeout_s=SEND_TIMEOUT_S)

    async def collect() -> dict[str, Any]:
        async for piece in pieces:
            prepared.format.add(piece)
        return prepared.format.whole()

    try:
        answer = await _while_connected(request, collect)
    finally:
        engine.cancel(feed)
    return Response(status_code=CLOSED_REQUEST) if answer is None else JSONResponse(answer)


async def _events(pieces: AsyncIterator[Any], form: Format) -> AsyncIterator[bytes]:
    try:
        async for piece in pieces:
            for chunk in form.take(piece):
                yield chunk
        for chunk in form.last():
            yield chunk
    except SwarmError as error:  # the headers are out: it can only be said in the stream
        yield event(from_swarm(error).body)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]  # a reader that has gone frees its pages now


async def _watched(gateway: Gateway, served: Served, feed: Feed) -> AsyncIterator[Any]:
    """The pieces, measured; however this ends, nothing of the answers is left at peers."""
    started_s, first, whole = time.monotonic(), True, False
    try:
        async for piece in feed:
            if first:
                gateway.metrics.first_token_s.labels(served.name).observe(time.monotonic() - started_s)
                first = False
            yield piece
        whole = True
        gateway.metrics.answer_s.labels(served.name).observe(time.monotonic() - started_s)
    except SwarmError:
        whole = True
        raise
    finally:
        served.engine.cancel(feed)
        if not whole:
            gateway.metrics.disconnects.inc()


async def _while_connected(request: Request, work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
    """What `work` returns, or None when the reader left before, which cancels it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work()), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _health(served: Served) -> ModelState:
    """May wait for the network's thread."""
    coverage, failure, waited_for = served.engine.coverage(), served.engine.failure, served.engine.waited_for
    return ModelState(
        active=served.engine.counts().active,
        error=None if failure is None else str(failure),
        waiting=None if waited_for is None else str(waited_for),
        blocks=served.num_blocks,
        peers=len(coverage.peers) if coverage else 0,
        replication=coverage.replication if coverage else 0,
        gaps=[[gap.start, gap.end] for gap in coverage.gaps] if coverage else [[0, served.num_blocks]],
    )


def _card(served: Served) -> ModelCard:
    return ModelCard(
        id=served.name, object="model", created=served.created, owned_by="hiveswarm", max_model_len=served.context
    )


# --- errors ---


def _handlers() -> dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]:
    async def api(_: Request, error: ApiError) -> Response:
        return error.response()

    async def swarm(_: Request, error: SwarmError) -> Response:
        return from_swarm(error).response()

    async def validation(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error).response()

    async def http(request: Request, error: HTTPException) -> Response:
        text = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
        response = ApiError(error.status_code, text.get(error.status_code, str(error.detail))).response()
        response.headers.update(error.headers or {})
        return response

    async def defect(_: Request, error: Exception) -> Response:
        return ApiError(500, "the gateway failed, see its log").response()

    return {
        ApiError: api,
        SwarmError: swarm,
        RequestValidationError: validation,
        HTTPException: http,
        Exception: defect,
    }
