"""The dashboard's JSON, field by field: what `/api/v1/` answers, what its stream sends, and what `swarm top` draws.

    GET  /api/v1/snapshot              Snapshot       everything that the stream begins with
    GET  /api/v1/stream                SSE            `snapshot` (Snapshot) first, then `delta` (Delta)
    GET  /api/v1/overview              Overview       network, totals, models; no peers
    GET  /api/v1/peers                 PeerList       ?model= ?state= ?q= ?offset=0 ?limit=100
    GET  /api/v1/peers/{peer_id}       PeerDetail     404: never seen, or gone for long
    GET  /api/v1/models/{model}/route  RouteDetail    the way a client here would go now, and why; by id or name
    GET  /api/v1/topology              Topology       ?model=: peers as points, measured links, the best route
    GET  /api/v1/events                EventList      ?kind= (repeated) ?model= ?peer= ?q= ?before=ID ?limit=100
    GET  /api/v1/history               History        ?model= ?hours=6 ?points=240
    GET  /api/v1/join                  Join           the commands and the invite
    POST /api/v1/reachability          Reachability   body: ReachabilityRequest; 429 with Retry-After
    GET  /api/v1/badge.svg             an image       ?model=
    GET  /metrics, /health             Prometheus' text; Health
    any error                          Problem        with its status

Units close the names: `_s` are seconds, `_at_s` Unix seconds by the dashboard's clock. An age is `now_s` minus
`…_at_s`: add to `now_s` of the last message what has passed since it came. What is not known is null, never zero. Every
text that a peer chose (names, versions, addresses, reasons) is bounded and printable, and no more: who shows it escapes
it.

The stream: every message has an id, to be sent back as `Last-Event-ID` (or `?last_event_id=`): what was missed comes
then, or a `snapshot` where that is too much. A reader that is behind gets a `snapshot` too. `delta` comes at most once
a second, and every 10 s where nothing changed. Merge by key: `peers` into rows by `peer_id`, `models` by `model_id`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Span = tuple[int, int]
"""Blocks `[start, end)`."""


class Json(BaseModel):
    """Base of all: immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class State(StrEnum):
    """What a peer is: as it says itself, or gone."""

    JOINING = "joining"
    ONLINE = "online"
    PAUSED = "paused"
    DRAINING = "draining"
    LEFT = "left"
    """It said goodbye."""
    LOST = "lost"
    """Its record expired and it had not said goodbye."""


GONE = (State.LEFT, State.LOST)


class EventKind(StrEnum):
    JOINED = "joined"
    RETURNED = "returned"
    """After it had left or was lost, within what the dashboard remembers."""
    LEFT = "left"
    LOST = "lost"
    MOVED = "moved"
    """It serves other blocks."""
    PAUSED = "paused"
    RESUMED = "resumed"
    GAP_OPENED = "gap_opened"
    """Nobody serves these blocks any more."""
    GAP_HEALED = "gap_healed"


class PeerRow(Json):
    """One peer in one line: claims of its signed record, and what it answered last when it was asked."""

    peer_id: str
    name: str
    """A claim, and often empty."""
    model_id: str
    model_name: str
    spans: list[Span]
    state: State
    dtype: str
    quantization: str
    version: str
    relayed: bool | None
    """Whether it is reached only through others; None: it announces no address."""
    decode_s_per_block: float
    prefill_s_per_token_block: float
    cache_tokens: int
    first_seen_at_s: float
    record_at_s: float
    """When its newest record was first read."""
    gone_at_s: float | None = None
    """When it left or was lost; it is shown for ten minutes more."""

    # from its last answer; the record's own values while there is none
    free_tokens: int
    queue_s: float
    sessions: int
    queued_tokens: int | None = None
    started_at_s: float | None = None
    """Since when its process serves."""
    rtt_s: float | None = None
    """Between the dashboard and the peer, smoothed."""
    status_at_s: float | None = None
    """When it answered last. None: never."""
    problem: str = ""
    """Why it did not answer the last call; empty when it did, or was not called yet."""


class PeerPatch(BaseModel):
    """`peer_id`, and those fields of PeerRow that changed; all of them for a peer that is new."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peer_id: str


class Event(Json):
    """Something that happened. Ids grow, also over restarts of the dashboard."""

    id: int
    at_s: float
    kind: EventKind
    model_id: str
    model_name: str
    peer_id: str | None = None
    """None for events of a model."""
    name: str = ""
    spans: list[Span]
    """What the peer serves, or the blocks of the gap."""
    before: list[Span] = []
    """MOVED: what it served."""
    text: str
    """In words."""


class RouteHop(Json):
    peer_id: str
    name: str
    span: Span


class AdapterView(Json):
    name: str
    """A claim, and not unique."""
    digest: str
    """The first digits of it: name@digest is what a client asks for."""
    hosts: int
    """Online peers that host it."""
    gaps: list[Span]
    """Blocks that none of those serves."""


class ModelView(Json):
    model_id: str
    """64 hexadecimal digits."""
    name: str
    """As most of its peers call it: a claim."""
    num_blocks: int
    healthy: bool
    """Every block has a holder."""
    replication: int
    """Holders of the rarest block."""
    holders: list[int]
    """Per block, how many online peers serve it: 0 is a gap, 1 a single holder."""
    gaps: list[Span]
    single: list[Span]
    """Blocks with one holder."""
    states: dict[State, int]
    """How many peers are in each state; those that are gone, too."""
    sessions: int
    queued_tokens: int
    """As far as peers answered."""
    free_tokens: int
    """Of the block that has least, over all its holders."""
    stream_tokens_per_s: float | None
    """What one user gets, by the router's cost of the best route from here; None without a route."""
    total_tokens_per_s: float
    """What all users together get at most, by maximum flow over what peers say of their speed."""
    route: list[RouteHop] | None
    route_problem: str = ""
    """Why there is no route."""
    adapters: list[AdapterView] = []
    """That peers host for everybody; those with most hosts where they are very many."""


class Totals(Json):
    states: dict[State, int]
    models: int
    healthy_models: int
    sessions: int
    stream_tokens_per_s: float | None
    """Of the model that has most peers."""
    total_tokens_per_s: float
    """Of all models."""
    answering: int
    """Live peers that answered their last call."""
    memory_offered_bytes: int
    """By peers that answered."""
    memory_used_bytes: int


class Overview(Json):
    network: str
    version: str
    """Of the dashboard."""
    now_s: float
    started_at_s: float
    read_at_s: float | None
    """When the network's index was read last with success; None: not yet."""
    problem: str
    """Why the view is stale, where it is."""
    totals: Totals
    models: list[ModelView]
    """Those with most peers first."""
    models_left_out: int
    """Beyond 32."""


class Snapshot(Overview):
    """All that there is to show; the stream begins with it."""

    peers: list[PeerRow]
    events: list[Event]
    """The latest 50, newest first."""


class Delta(Json):
    """What changed since the message before."""

    now_s: float
    read_at_s: float | None
    problem: str
    totals: Totals
    peers: list[PeerPatch] = []
    forgotten: list[str] = []
    """Peers that are shown no longer."""
    models: list[ModelView] = []
    """Whole, each that changed."""
    models_gone: list[str] = []
    events: list[Event] = []
    """Oldest first."""


class PeerList(Json):
    now_s: float
    total: int
    """That match, on whatever page."""
    peers: list[PeerRow]


class AddressView(Json):
    address: str
    relayed: bool
    public: bool
    """Whether anybody on the internet may dial it; false for a private network's, and for a name."""


class RoundTrip(Json):
    """Between the peer and another one, measured by one of both."""

    peer_id: str
    """The other one."""
    name: str
    rtt_s: float
    measured_by_it: bool
    """By this peer; else by the other one."""
    at_s: float


class Opinion(Json):
    """What a peer has against another, from its own dealings alone."""

    peer_id: str
    """Who says so (of PeerDetail.reputation), or of whom (of PeerDetail.opinions)."""
    name: str
    strikes: float
    """Failures, halved every five minutes."""
    backed_off_until_s: float | None
    """It is left alone until then."""
    reason: str
    at_s: float


class LayerTimes(Json):
    """Seconds per block."""

    decode_s: float
    """For one token of one session."""
    prefill_s_per_token: float
    """For each token of a prompt."""


class StatusView(Json):
    """What the peer itself answered, `at_s`."""

    at_s: float
    uptime_s: float
    announced: LayerTimes
    """Measured alone, at its start."""
    lately: LayerTimes | None
    """As its steps took in the last minutes; None where there were none."""
    queue_s: float
    queued_tokens: int
    sessions: int
    free_tokens: int
    cache_tokens: int
    pages: int
    """Of its cache."""
    free_pages: int
    kept_pages: int
    """Free but for the beginnings of prompts that they remember."""
    memory_offered_bytes: int
    memory_used_bytes: int
    """By its process, and on its devices."""
    steps: int
    """Computed since its start."""
    tokens: int
    refused: int
    """Steps, for want of room."""
    device: str
    moved_from: list[Span] = []
    """What it served before, where it moved."""
    moved_at_s: float | None = None


class PeerDetail(PeerRow):
    now_s: float
    num_blocks: int
    """Of the model."""
    protocol: int
    addresses: list[AddressView]
    expires_at_s: float
    max_bytes_per_s: int | None
    """Which its owner allows it, each way."""
    uplink_bytes_per_s: int | None
    """That it measured of what it sends; None: not known, or nothing slow."""
    max_blocks: int | None
    """So many fit there and it may move; None: what it serves was chosen for it."""
    adapters: list[str]
    """That it hosts for everybody, each with the first digits of its digest."""
    intent: Span | None
    """Where it is about to move."""
    place: tuple[float, float, float, float] | None
    """Its network coordinate: x, y, height in seconds, relative error."""
    status: StatusView | None
    round_trips: list[RoundTrip]
    reputation: list[Opinion]
    """What others have against it."""
    opinions: list[Opinion]
    """What it has against others."""
    events: list[Event]
    """Its latest 20, newest first."""


class HopDetail(RouteHop):
    trip_s: float
    queue_s: float
    compute_s: float
    measured: bool
    """Else it is what the peer says, and what places predict."""
    candidates: int
    """Peers that could serve this hop."""


class RouteDetail(Json):
    now_s: float
    model_id: str
    cost_s: float
    """Of one token, from the first frame out to the last answer back."""
    tokens_per_s: float
    hops: list[HopDetail]
    left_out: list[tuple[str, str]]
    """Peers that cannot be used now, by name or id, and why; 50 at most."""


class Node(Json):
    """One peer in the graph; its row has the rest."""

    peer_id: str
    place: tuple[float, float] | None
    """x and y in seconds, where it says: near peers have short round trips."""


class LinkView(Json):
    a: str
    b: str
    """Two peer ids; or "" for the dashboard itself."""
    rtt_s: float
    at_s: float


class Topology(Json):
    now_s: float
    model_id: str | None
    nodes: list[Node]
    links: list[LinkView]
    """The latest 4,000."""
    route: list[str]
    """Peer ids of the best route, in order; empty where there is none."""


class EventList(Json):
    now_s: float
    events: list[Event]
    """Newest first."""
    more: bool
    """There are older ones: ask with `before` = the id of the last."""


class HistoryPoint(Json):
    """Means over one interval, but for `replication` and `gap_blocks`: the worst in it."""

    at_s: float
    """Where the interval begins."""
    online: float
    sessions: float
    queued_tokens: float
    free_tokens: float
    stream_tokens_per_s: float | None
    total_tokens_per_s: float
    replication: int
    gap_blocks: int


class History(Json):
    now_s: float
    model_id: str | None
    """None: nothing was recorded yet."""
    interval_s: float
    points: list[HistoryPoint]
    """Oldest first; no point stands for an interval in which no dashboard ran."""


class JoinCommand(Json):
    model_id: str
    model_name: str
    command: str
    """To be pasted into a shell; safe whatever the model is called."""
    note: str = ""
    """What to know before, e.g. that blocks are missing."""


class Join(Json):
    network: str
    invite: str
    """swarm://…"""
    addresses: list[str]
    """The entry nodes in it."""
    install: str
    commands: list[JoinCommand]
    """The models in need first."""
    note: str = ""
    """Where the entry nodes can be reached from this machine or this local network only."""


class ReachabilityRequest(Json):
    """One of both."""

    peer_id: Annotated[str | None, Field(max_length=128)] = None
    """Of a peer in this swarm; its announced addresses are dialled."""
    address: Annotated[str | None, Field(max_length=256)] = None
    """A multiaddr that ends in /p2p/<peer id>."""


class Check(Json):
    """One thing that was tried, in order."""

    what: str
    """e.g. "announced in the swarm", "TCP connection to 203.0.113.7 port 4001"."""
    ok: bool
    detail: str
    """What was found, or what is wrong."""


class Reachability(Json):
    peer_id: str
    reachable: bool
    summary: str
    """One sentence."""
    hint: str
    """What to do next; empty where it is reachable."""
    rtt_s: float | None
    checks: list[Check]


class Problem(Json):
    error: str
    hint: str = ""


class Health(Json):
    status: str
    """"ok", "starting" or "stale"."""
    read_at_s: float | None
    problem: str


def plain(model: BaseModel) -> dict[str, Any]:
    """As JSON values."""
    return model.model_dump(mode="json")
