"""The messages of this protocol version: frozen, typed, bounded. Owns their meaning; knows neither bytes nor tensors.

A frame carries messages and, for `Step`, `Relay`, `Result`, `Train` and `Trained`, the raw rows of one tensor each
(`peers.wire.codec`).

    client                    hop 0            hop 1            hop 2
      │ Open ─────────────────►│                │                │      one to each hop, together
      │ ◄──────────────────────┴─ Opened ───────┴────────────────┤
      │ Step ─────────────────►│ Step ─────────►│ Step ─────────►│      each hop pushes to the next one
      │ ◄──────────────────────────────────────────────── Result │      on the stream that the client opened
      │ ◄── Relay ─────────────┤                                        only when hop 0 cannot reach hop 1
      │ ◄── Failed ────────────┴────────────────┴────────────────┤      any hop, straight to the client
      │ Close ────────────────►│ … every hop

When a hop dies, the others are opened again under the next epoch and keep what they hold; the one before the gap sends
its journal to the replacement, and the client sends no positions at all:

    client                    hop 0            new hop 1        hop 2
      │ Open (keep) ──────────►│ Open ─────────►│ Open (keep) ──►│
      │ Replay ───────────────►│ Step (stop) ──►│                │      positions that hop 2 holds already
      │ ◄──────────────────────────────── Result┤                │
      │ Replay ───────────────►│ Step ─────────►│ Step ─────────►│      the step that was under way
      │ ◄──────────────────────────────────────────────── Result │

A session may have low-rank adapters of the client's own at its hops (`Adapter`, then `Open.adapter`). A hop that
dropped one says `unknown_adapter`: it is sent again, and the hop opened under the next epoch, with what it holds.

A standby is opened as the hop that it stands for is, and fed with `Replay (to)` while the route works: should that hop
die, the next epoch keeps what the standby holds.

Training needs no session: a client asks one hop after another, and each answers the client (`swarm.session.training`).
What a hop is asked is a pure function of what it is sent, so it may be asked again, and anybody else instead of it:

    client                    hop 0            hop 1
      │ Train (input) ────────►│                │                      in parts; several works at once
      │ ◄────────────── Trained┤                │                      the output
      │ Train (its output) ─────────────────────►│
      │ ◄─────────────────────────────── Trained┤
      │ Train (gradient of the output) ─────────►│                      backward
      │ ◄─────────────────────────────── Trained┤                      the gradient of the input
      │ ◄─────────────────────── AdapterGradient┤                      behind the last one: of all of them together
      │ Train (backward) ─────►│                │
      │ ◄──────────── Untrained┤                │                      `forgotten`: asked again with the input
      │ Forget ───────────────►│ … every hop

Field bounds are part of the type: a message outside them cannot be decoded, and so never reaches a session.
"""

from __future__ import annotations

import enum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from routing.ids import MAX_SPANS

PROTOCOL_VERSION = 7
MAX_POSITIONS = 1 << 24
MAX_HOPS = 64
MAX_UNDER_WAY = 16
"""Steps of a session that are sent and not answered: peers keep so many answers, of at most 1 MiB each."""
UNDER_WAY_BYTES = 16 << 20
"""Of the hidden states in these, where they are more than a few steps: so much of one client any peer takes in."""
MAX_CLOSED_SESSIONS = 512
MAX_STATUS_ENTRIES = 32
"""Round trips, and opinions of others, in one status."""
PREFIX_POSITIONS = 32
"""Positions for which one prefix key stands."""
MAX_SEQUENCES = 1024
"""In one work of training."""
MAX_SUMMED = 512
"""Works whose adapter's gradients are added up."""
MAX_RANK = 256
"""Of an adapter."""
MAX_TARGETS = 640
"""Of an adapter, for the blocks of one peer."""
PREFIX = "*"
"""No module's path."""
MAX_PREFIX_KEYS = 1024
"""Of 16 bytes each, in a header of 32 KiB: the first 32,768 positions of a session can be shared."""

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]
Block = Annotated[int, Meta(ge=0, le=65_536)]
Epoch = Annotated[int, Meta(ge=0, le=1 << 32)]
Counter = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
PeerText = Annotated[str, Meta(min_length=1, max_length=128)]
Address = Annotated[str, Meta(min_length=1, max_length=512)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=8)]
ShortText = Annotated[str, Meta(max_length=64)]
AdapterName = Annotated[bytes, Meta(min_length=16, max_length=32)]
PrefixKeys = Annotated[tuple[Bytes16, ...], Meta(max_length=MAX_PREFIX_KEYS)]
Sentence = Annotated[str, Meta(max_length=1024)]
Lengths = Annotated[
    tuple[Annotated[int, Meta(ge=1, le=MAX_POSITIONS)], ...], Meta(min_length=1, max_length=MAX_SEQUENCES)
]
Jumps = Annotated[
    tuple[tuple[Count, Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]], ...], Meta(max_length=MAX_SEQUENCES)
]
"""Rows, in order, and how many positions are left out before each of them."""
Timings = Annotated[tuple[tuple[Seconds, Seconds], ...], Meta(max_length=MAX_HOPS)]
"""For each hop passed so far: seconds in its queue, seconds of compute."""


class Code:
    """Why a hop declined; `Failed.code`. Strings, so that a later version may add some."""

    BUSY = "busy"  # healthy, no room: wait `retry_after_s`
    PREEMPTED = "preempted"  # the session's pages went to another: release, wait, replay from position 0
    PAUSED = "paused"  # stepping back for its owner: choose another peer, no blame; back after `retry_after_s` at best
    DRAINING = "draining"  # leaving: choose another peer, no blame
    UNKNOWN_SESSION = "unknown_session"  # lease expired or the peer restarted: open again and replay
    STALE_EPOCH = "stale_epoch"  # this route was replaced
    GAP = "gap"  # the step starts behind the positions held: replay
    REPLAY = "replay"  # it goes back to where layers with a window hold too little: open again, send from position 0
    NOT_JOURNALLED = "not_journalled"  # what was sent for these positions is not kept any more: replay one hop up
    UNREACHABLE = "unreachable"  # the standby that a replay is for cannot be reached from here
    FORBIDDEN = "forbidden"  # the sender is not the predecessor that the client named
    WRONG_MODEL = "wrong_model"  # this peer serves other weights or other blocks
    TOO_LONG = "too_long"  # more positions than the model or the whole pool has
    MALFORMED = "malformed"  # NaN, wrong dtype, impossible shape
    INTERNAL = "internal"  # the computation itself failed here
    NO_TRAINING = "no_training"  # this peer computes no gradients: choose another one
    UNKNOWN_ADAPTER = "unknown_adapter"  # it was not sent, or dropped since: send it, and then the rest again
    FORGOTTEN = "forgotten"  # nothing is kept of this work: send its input with the gradient


CODES = frozenset(value for name, value in vars(Code).items() if name.isupper())
"""Those that this version knows."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    """Base of all messages: immutable and compared by value."""


class Hello(Message, tag="hello", frozen=True, kw_only=True):
    """First frame on every stream, in both directions. Its fields never change between versions."""

    version: int
    network: ShortText
    software: ShortText
    lane: ShortText
    """"small" or "bulk": a pair of nodes keeps small frames apart from large ones."""
    instance: Bytes16
    """Random per process: joins the lanes of one link."""
    time_s: float
    """The sender's clock (Unix seconds), so that skew can be named."""


class Open(Message, tag="open", frozen=True, kw_only=True):
    """Install one hop of a route. A higher epoch replaces the older route; of that one the hop keeps at most the first
    `keep` positions, with what it sent its successor for them, where it served the same blocks.

    A route may pass a peer several times; the hops of a session are told apart by the block with which they begin.

    Key i of `prefix` names everything that decides the session's positions `[0, (i + 1) · PREFIX_POSITIONS)` at this
    hop, and nothing else; who sends it has made it so that nobody else can. The steps that follow send those positions.
    """

    session: Bytes16
    epoch: Epoch
    model: Bytes32
    start: Block
    end: Block
    previous: PeerText | None
    """Who may push steps under this epoch; None: only the client itself."""
    next: PeerText | None
    """Where outputs go; None: back to the client, on its own stream."""
    next_addresses: Addresses = ()
    prefix: PrefixKeys = ()
    keep: Count = 0
    adapter: AdapterName | None = None
    """With which the blocks compute for this session and its forks: one of the sender's own (`Adapter`) or, by the
    digest in its record, one that the peer hosts for everybody."""
    standby: bool = False
    """Only held ready, should another peer's hop be lost: nobody gives way for it, and it is the first to go."""
    expects: Count = 0
    """The session may come to hold so many positions, as far as the client knows; 0: nobody knows. A hop promises room
    for no more. Who becomes longer than it said has what nobody was promised, and gives way before all others."""


class Opened(Message, tag="opened", frozen=True, kw_only=True):
    """The hop is installed; it is released `lease_s` after the last step, or when the client's link closes."""

    session: Bytes16
    start: Block
    epoch: Epoch
    lease_s: Seconds
    held: Count = 0
    """The hop holds so many positions, of the offered prefix or of the older route: steps may start there, or below."""
    journal: Count = 0
    """What the hop sent its successor for positions from here up to `held` it can send again (`Replay`)."""


class Urgency(enum.IntEnum):
    """What a step is for. Peers take the lower first, and let nobody wait for ever."""

    INTERACTIVE = 0
    """Somebody waits for it."""
    BACKGROUND = 2
    """Nobody does yet. Between the two stands training, which has messages of its own: see `peers.runtime.errands`."""


class Step(Message, tag="step", frozen=True, kw_only=True):
    """One forward of a session over `count` positions from the absolute position `first`; carries [count, hidden].

    A hop that holds more than `first` positions truncates, or answers `replay` where layers with a window do not hold
    what is needed so far back. A repeated `step` id returns the stored answer. With a `parent`, `session` is new and
    forks from the parent's first `first` positions in this same step.
    """

    session: Bytes16
    block: Block
    """The one that the rows enter next: names the hop that this is for."""
    epoch: Epoch
    step: Counter
    first: Count
    count: Count
    want_from: Count
    """Rows `want_from:` of the last hop's output go back to the client; `count` means none."""
    regime_length: Count = 0
    """Length of the forward that the user asked for, for rotary variants that depend on it."""
    parent: Bytes16 | None = None
    dtype: ShortText
    hidden: Count
    bulk: bool = False
    urgency: Urgency = Urgency.INTERACTIVE
    hops: Timings = ()
    stop: Block = 0
    """The hop whose blocks end here answers the client; the hops behind it hold these positions. 0: the last hop."""
    expects: Count = 0
    """The session goes on, and may come to hold so many, more than was said before: promised where there is room."""
    again: bool = False
    """Sent once more behind what came after it, maybe: such a step undoes nothing that did, and begins no fork."""


class Replay(Message, tag="replay", frozen=True, kw_only=True):
    """From the client: send your successor again what you sent for `count` positions from `first` on, as this step.

    Fields as in `Step`. The answer is the step's, or `Failed` with `NOT_JOURNALLED`. With `to`, send it not to the
    successor but to that peer, which was opened as a standby for it; where it cannot be reached: `UNREACHABLE`.
    """

    session: Bytes16
    block: Block
    """The one with which the hop begins that is asked."""
    epoch: Epoch
    step: Counter
    first: Count
    count: Count
    want_from: Count
    regime_length: Count = 0
    bulk: bool = False
    urgency: Urgency = Urgency.INTERACTIVE
    stop: Block = 0
    to: PeerText | None = None
    to_addresses: Addresses = ()


class Relay(Message, tag="relay", frozen=True, kw_only=True):
    """A hop could not reach `next`: the client carries the enclosed step there itself."""

    next: PeerText
    reason: Sentence
    step: Step


class Result(Message, tag="result", frozen=True, kw_only=True):
    """The answer of the last hop that ran the step: [count, hidden], the rows that the step wanted."""

    session: Bytes16
    epoch: Epoch
    step: Counter
    count: Count
    dtype: ShortText
    hidden: Count
    hops: Timings = ()


class Failed(Message, tag="failed", frozen=True, kw_only=True):
    """A hop could not do what the session asked; `code` from `Code`."""

    peer: PeerText
    """The hop that declined; differs from the sender when a predecessor passes the message on."""
    session: Bytes16
    block: Block
    """With which that hop begins."""
    epoch: Epoch
    step: Counter | None = None
    code: ShortText
    message: Sentence
    retry_after_s: Seconds = 0.0


class Close(Message, tag="close", frozen=True, kw_only=True):
    """Free these sessions of the sender, at every hop that this peer is to them. Needs no answer."""

    sessions: Annotated[tuple[Bytes16, ...], Meta(max_length=MAX_CLOSED_SESSIONS)]


class Train(Message, tag="train", frozen=True, kw_only=True):
    """Rows `[first, first + count)` of a work of training, in order of rows; the last of them begins it.

    A work runs whole sequences of these `lengths`, row behind row, through blocks `[start, end)`: positions count from
    0 in each, but for `jumps`; no session is opened and nothing is written to a cache. Its rows are its input,
    [sum(lengths), hidden]; with `backward` the gradient of its output; with `backward` and `again` first the input,
    then that gradient.
    """

    work: Bytes16
    """Chosen by the client for these blocks and this input; the same with `backward`."""
    model: Bytes32
    start: Block
    end: Block
    lengths: Lengths
    jumps: Jumps = ()
    regime_length: Count = 0
    """As of a `Step`."""
    backward: bool = False
    again: bool = False
    keep: bool = False
    """`backward` will be asked for: keep what it needs, as far as there is room."""
    adapter: Bytes32 | None = None
    """Of the sender's own (`Adapter`), with which the blocks compute in this work."""
    dropout: Share = 0.0
    """Of the inputs of the adapter's layers (`peers.model.adapters`)."""
    seed: Counter = 0
    """For that."""
    sequence: Count = 0
    """Which sequence under that seed the first one of this work is."""
    sum: Bytes16 | None = None
    """With `backward` and an adapter: to which sum of the sender's its gradient is added, once. None: to none, and it
    comes behind the answer."""
    collect: bool = False
    """That sum ends with this work, and comes behind its answer."""
    first: Count
    count: Count
    dtype: ShortText
    hidden: Count


class AdapterTarget(msgspec.Struct, frozen=True, array_like=True):
    """One linear layer to whose output an adapter adds, or what it puts before a block's keys and values
    (`peers.model.adapters`)."""

    block: Block
    module: Annotated[str, Meta(min_length=1, max_length=96)]
    """Its path within the block; PREFIX for keys and values."""
    rank: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    inputs: Annotated[int, Meta(ge=1, le=1 << 20)]
    outputs: Annotated[int, Meta(ge=1, le=1 << 20)]
    scaling: float


Targets = Annotated[tuple[AdapterTarget, ...], Meta(min_length=1, max_length=MAX_TARGETS)]


class Adapter(Message, tag="adapter", frozen=True, kw_only=True):
    """Rows `[first, first + count)` of an adapter for blocks `[start, end)`, in order; [count, 256] in float32.

    It serves the sender's own works and sessions only, and is dropped when nobody used it for a while.
    """

    adapter: Bytes32
    """SHA-256 of its targets and values."""
    model: Bytes32
    start: Block
    end: Block
    targets: Targets
    first: Count
    count: Count


class AdapterGradient(Message, tag="adapter_gradient", frozen=True, kw_only=True):
    """Rows of the gradient of an adapter in these works together, as those of `Adapter`.

    Where there is no room for a sum, it comes behind each work alone.
    """

    sum: Bytes16
    """Or the only work."""
    works: Annotated[tuple[Bytes16, ...], Meta(min_length=1, max_length=MAX_SUMMED)]
    first: Count
    count: Count


class Trained(Message, tag="trained", frozen=True, kw_only=True):
    """Rows `[first, first + count)` of the answer, in order: the output, or with `backward` the input's gradient."""

    work: Bytes16
    backward: bool = False
    first: Count
    count: Count
    dtype: ShortText
    hidden: Count
    queue_s: Seconds = 0.0
    compute_s: Seconds = 0.0


class Untrained(Message, tag="untrained", frozen=True, kw_only=True):
    """There is no answer; `code` from `Code`."""

    work: Bytes16
    backward: bool = False
    code: ShortText
    message: Sentence
    retry_after_s: Seconds = 0.0


class Forget(Message, tag="forget", frozen=True, kw_only=True):
    """Drop these works and sums of the sender, and what is kept of them. Needs no answer."""

    works: Annotated[tuple[Bytes16, ...], Meta(max_length=MAX_CLOSED_SESSIONS)]


class Ping(Message, tag="ping", frozen=True, kw_only=True):
    """Answered by Pong at once, also by a peer whose engine is busy."""

    nonce: Counter
    detail: bool = False
    """Whether a status is wanted, too."""


class RoundTrip(msgspec.Struct, frozen=True, array_like=True):
    """What one peer measured to another."""

    peer: PeerText
    rtt_s: Seconds
    age_s: Seconds


class Opinion(msgspec.Struct, frozen=True, array_like=True):
    """What one peer has against another, from its own dealings alone."""

    peer: PeerText
    strikes: Seconds
    """Failures, halved in time."""
    backoff_s: Seconds
    """It is left alone for so long yet."""
    age_s: Seconds
    """Since the last failure."""
    reason: Annotated[str, Meta(max_length=128)]


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a peer is, beyond its record and the counts of a Pong. All of it is the peer's word."""

    uptime_s: Seconds
    queue_s: Seconds = 0.0
    """What steps waited before they were computed, lately."""
    decode_s_per_block: Seconds | None = None
    """As steps took lately, whoever else was in their forwards; None where there were none."""
    prefill_s_per_token_block: Seconds | None = None
    pages: Counter = 0
    free_pages: Counter = 0
    """No session holds these."""
    kept_pages: Counter = 0
    """Of the free ones, those that remember the beginning of a prompt."""
    memory_offered_bytes: Counter = 0
    memory_used_bytes: Counter = 0
    steps: Counter = 0
    """Computed since its start."""
    tokens: Counter = 0
    refused: Counter = 0
    """Steps, for want of room."""
    device: ShortText = ""
    moved_from: Annotated[tuple[tuple[Block, Block], ...], Meta(max_length=MAX_SPANS)] = ()
    """What it served before, where it moved."""
    moved_ago_s: Seconds = 0.0
    round_trips: Annotated[tuple[RoundTrip, ...], Meta(max_length=MAX_STATUS_ENTRIES)] = ()
    """The latest."""
    opinions: Annotated[tuple[Opinion, ...], Meta(max_length=MAX_STATUS_ENTRIES)] = ()
    """The latest; of those with whom all is well, none."""


class Pong(Message, tag="pong", frozen=True, kw_only=True):
    """Answer to Ping, with what a reader of the swarm's health wants to know now rather than from the last record."""

    nonce: Counter
    free_tokens: Count = 0
    queued_tokens: Count = 0
    sessions: Count = 0
    status: Status | None = None
    """Where it was asked for, and there is one: nodes that serve nothing, or are older, give none."""


class Trace(Message, tag="trace", frozen=True, kw_only=True):
    """From the client of a session from which nothing is heard: how far have its steps come? Answered by Traced."""

    nonce: Counter
    session: Bytes16
    block: Block
    """The one with which the hop begins that is asked."""
    patience_s: Seconds
    """The successor may take so long to answer the hop."""


class Traced(Message, tag="traced", frozen=True, kw_only=True):
    """Answer to Trace."""

    nonce: Counter
    running: Count = 0
    """Steps of the session that wait for the computation here, or are computed."""
    next_silent: bool = False
    """The successor did not answer over the link that outputs take. From now on they go through the client."""
    moving: bool = False
    """Large outputs are still on their way to the successor."""


class DialBack(Message, tag="dial_back", frozen=True, kw_only=True):
    """Please open a fresh connection to these addresses of mine and say how it went."""

    nonce: Counter
    addresses: Addresses


class DialBackReply(Message, tag="dial_back_reply", frozen=True, kw_only=True):
    """For each address asked: the address, and what went wrong ("" when it was reached)."""

    nonce: Counter
    results: Annotated[tuple[tuple[Address, Sentence], ...], Meta(max_length=8)]


AnyMessage: TypeAlias = (
    Hello
    | Open
    | Opened
    | Step
    | Replay
    | Relay
    | Result
    | Failed
    | Close
    | Train
    | Adapter
    | AdapterGradient
    | Trained
    | Untrained
    | Forget
    | Ping
    | Pong
    | Trace
    | Traced
    | DialBack
    | DialBackReply
)
