"""The decoder meets strangers' bytes: every message survives the trip, everything else is a ProtocolError."""

from __future__ import annotations

import contextlib
import math
import struct

import msgpack
import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from peers.errors import ProtocolError
from peers.wire import codec, tensors
from peers.wire.messages import (
    MAX_POSITIONS,
    MAX_PREFIX_KEYS,
    MAX_SEQUENCES,
    MAX_STATUS_ENTRIES,
    MAX_SUMMED,
    MAX_TARGETS,
    Adapter,
    AdapterGradient,
    AdapterTarget,
    AnyMessage,
    Close,
    DialBack,
    DialBackReply,
    Failed,
    Forget,
    Hello,
    Open,
    Opened,
    Opinion,
    Ping,
    Pong,
    Relay,
    Result,
    RoundTrip,
    Status,
    Step,
    Trace,
    Traced,
    Train,
    Trained,
    Untrained,
    Urgency,
)

SESSION = bytes(range(16))
STEP = Step(
    session=SESSION,
    block=3,
    epoch=3,
    step=7,
    first=10,
    count=2,
    want_from=1,
    dtype="float32",
    hidden=4,
    hops=((0.5, 0.25),),
)
MESSAGES: list[AnyMessage] = [
    Hello(version=1, network="n", software="x", lane="small", instance=SESSION, time_s=1.5),
    Open(
        session=SESSION, epoch=1, model=bytes(32), start=0, end=3, previous=None, next="p", next_addresses=("/a",),
        prefix=(SESSION, bytes(16)),
    ),
    Open(
        session=SESSION, epoch=1 << 32, model=bytes(32), start=65_536, end=65_536, previous="p" * 128, next="p" * 128,
        next_addresses=("a" * 512,) * 8, prefix=(SESSION,) * MAX_PREFIX_KEYS, expects=MAX_POSITIONS,
    ),
    Opened(session=SESSION, start=3, epoch=1, lease_s=30.0, held=128),
    STEP,
    msgspec.structs.replace(STEP, expects=MAX_POSITIONS),
    Relay(next="p", reason="no way", step=msgspec.structs.replace(STEP, urgency=Urgency.BACKGROUND)),
    Result(session=SESSION, epoch=1, step=7, count=1, dtype="bfloat16", hidden=4),
    Failed(peer="p", session=SESSION, block=3, epoch=1, step=None, code="busy", message="later", retry_after_s=0.5),
    Close(sessions=(SESSION,)),
    Train(work=SESSION, model=bytes(32), start=0, end=3, lengths=(3, 1), first=1, count=2, dtype="float32", hidden=4),
    Train(
        work=SESSION, model=bytes(32), start=65_536, end=65_536, lengths=(1 << 24,) * MAX_SEQUENCES, backward=True,
        again=True, keep=True, regime_length=1 << 24, first=1 << 24, count=1 << 24, dtype="d" * 64, hidden=1 << 24,
        jumps=((1 << 24, 1 << 24),) * MAX_SEQUENCES, adapter=bytes(32), dropout=0.1, seed=1 << 62, sequence=1 << 24,
        sum=SESSION, collect=True,
    ),
    Trained(work=SESSION, backward=True, first=1, count=2, dtype="float32", hidden=4, queue_s=0.5, compute_s=1.5),
    Untrained(work=SESSION, code="busy", message="later", retry_after_s=0.5),
    Forget(works=(SESSION,)),
    Adapter(
        adapter=bytes(32), model=bytes(32), start=65_536, end=65_536, first=1 << 24, count=1 << 24,
        targets=(AdapterTarget(65_536, "self_attn.q_proj", 256, 1 << 20, 1 << 20, 2.0),) * MAX_TARGETS,
    ),
    AdapterGradient(sum=SESSION, works=(SESSION,) * MAX_SUMMED, first=3, count=2),
    Ping(nonce=1),
    Ping(nonce=1, detail=True),
    Pong(nonce=1, free_tokens=5),
    Pong(nonce=1, status=Status(uptime_s=1.5, decode_s_per_block=0.25, device="cuda:0", moved_from=((0, 4), (6, 8)))),
    Pong(
        nonce=1, free_tokens=1 << 24, queued_tokens=1 << 24, sessions=1 << 24,
        status=Status(
            uptime_s=1e9, queue_s=1e9, decode_s_per_block=1e9, prefill_s_per_token_block=1e9, pages=1 << 62,
            free_pages=1 << 62, kept_pages=1 << 62, memory_offered_bytes=1 << 62, memory_used_bytes=1 << 62,
            steps=1 << 62, tokens=1 << 62, refused=1 << 62, device="d" * 64, moved_from=((65_536, 65_536),) * 8,
            moved_ago_s=1e9, round_trips=(RoundTrip("p" * 128, 1e9, 1e9),) * MAX_STATUS_ENTRIES,
            opinions=(Opinion("p" * 128, 1e9, 1e9, 1e9, "\U0001f41d" * 128),) * MAX_STATUS_ENTRIES,
        ),
    ),
    Trace(nonce=1, session=SESSION, block=3, patience_s=0.5),
    Traced(nonce=1, running=2, next_silent=True),
    DialBack(nonce=2, addresses=("/ip4/127.0.0.1/tcp/1",)),
    DialBackReply(nonce=2, results=(("/ip4/127.0.0.1/tcp/1", ""),)),
]  # fmt: skip


OPEN = {"t": "open", "session": SESSION, "epoch": 1, "model": bytes(32), "start": 0, "end": 3}
OPEN |= {"previous": None, "next": None}


def status_frame(**changes: object) -> bytes:
    return frame_of({"t": "pong", "nonce": 1, "status": {"uptime_s": 1.0} | changes})


def frame_of(fields: object, payload: bytes = b"") -> bytes:
    return raw_frame(msgpack.packb(fields), payload)


def raw_frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", 4 + len(header) + len(payload), len(header)) + header + payload


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_trip(message: AnyMessage) -> None:
    ((decoded, payload),) = codec.decode(codec.encode(message))
    assert decoded == message
    assert len(payload) == 0


def test_a_payload_comes_back_whole() -> None:
    ((_, payload),) = codec.decode(codec.encode(STEP, 8) + b"12345678")
    assert bytes(payload) == b"12345678"


@given(st.lists(st.tuples(st.sampled_from(MESSAGES), st.binary(max_size=9)), min_size=1, max_size=5))
def test_messages_that_share_a_frame_come_back_in_order(sent: list[tuple[AnyMessage, bytes]]) -> None:
    sent = [(message, payload if isinstance(message, Step | Relay | Result) else b"") for message, payload in sent]
    frame = b"".join(codec.encode(message, len(payload)) + payload for message, payload in sent)
    assert [(message, bytes(payload)) for message, payload in codec.decode(frame)] == sent


def test_the_frame_that_a_damaged_one_differs_from_is_accepted() -> None:
    assert isinstance(codec.decode(frame_of(OPEN | {"prefix": [SESSION] * MAX_PREFIX_KEYS}))[0][0], Open)


def test_an_older_node_is_asked_in_words_that_it_understands() -> None:
    """It ignores the wish for detail, and answers without."""
    assert codec.decode(frame_of({"t": "pong", "nonce": 1, "sessions": 2}))[0][0] == Pong(nonce=1, sessions=2)
    assert codec.encode(Ping(nonce=1)) == frame_of({"t": "ping", "nonce": 1})


def test_who_is_not_told_how_long_a_session_may_become_takes_it_that_nobody_knows() -> None:
    """So nodes that know no such field, and those that do, understand each other."""
    ((opened, _),) = codec.decode(frame_of(OPEN))
    assert isinstance(opened, Open)
    assert opened.expects == 0
    assert b"expects" not in codec.encode(opened)


def test_unknown_fields_are_ignored_so_that_later_versions_may_add_some() -> None:
    assert codec.decode(frame_of({"t": "ping", "nonce": 1, "later": [1, 2]}))[0][0] == Ping(nonce=1)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00\x00",
        struct.pack(">I", 1 << 31),
        struct.pack(">II", 50, 46) + b"short",
        struct.pack(">II", 4, 46) + frame_of({"t": "ping", "nonce": 1}),
        frame_of({"t": "ping", "nonce": 1}) + b"\x00",
        frame_of([1, 2]),
        frame_of({"t": "nothing"}),
        frame_of({"t": "ping"}),
        frame_of({"t": "ping", "nonce": -1}),
        frame_of({"t": "ping", "nonce": True}),
        frame_of({"t": "close", "sessions": [b"short"]}),
        frame_of({"t": "close", "sessions": [SESSION] * 600}),
        frame_of(OPEN | {"prefix": [SESSION] * (MAX_PREFIX_KEYS + 1)}),
        frame_of(OPEN | {"prefix": [b"short"]}),
        frame_of(OPEN | {"expects": -1}),
        frame_of(OPEN | {"expects": MAX_POSITIONS + 1}),
        frame_of(msgspec.to_builtins(STEP, builtin_types=(bytes,)) | {"expects": MAX_POSITIONS + 1}),
        frame_of({"t": "opened", "session": SESSION, "epoch": 1, "lease_s": 1.0, "held": -1}),
        frame_of({"t": "ping", "nonce": 1}, b"payload"),
        frame_of({"t": "ping", "nonce": 1, "detail": 1}),
        frame_of({"t": "pong", "nonce": 1, "status": {}}),
        status_frame(uptime_s=-1.0),
        status_frame(uptime_s=float("nan")),
        status_frame(queue_s=float("inf")),
        status_frame(steps=-1),
        status_frame(memory_used_bytes=1 << 63),
        status_frame(device="d" * 65),
        status_frame(moved_from=[[0, 1]] * 9),
        status_frame(moved_from=[[0, 1, 2]]),
        status_frame(round_trips=[["p", 0.1, 0.0]] * (MAX_STATUS_ENTRIES + 1)),
        status_frame(round_trips=[["", 0.1, 0.0]]),
        status_frame(round_trips=[["p", float("nan"), 0.0]]),
        status_frame(opinions=[["p", 1.0, 1.0, 1.0, "r" * 129]]),
        frame_of({1: 2}),
        raw_frame(b"\x82\xa1t\xa4ping\xa5later\xdd\xff\xff\xff\xff"),
        raw_frame(b"\x82\xa1t\xa4ping\xa5later" + b"\x91" * 30_000),
    ],
)
def test_what_no_encoder_would_write_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(frame)


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_protocol_errors(junk: bytes) -> None:
    for frame in (junk, struct.pack(">II", len(junk) + 4, len(junk)) + junk):
        with contextlib.suppress(ProtocolError):
            codec.decode(frame)


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_message_raises_only_protocol_errors(message: AnyMessage, data: st.DataObject) -> None:
    frame = bytearray(codec.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        codec.decode(frame)


@given(
    st.sampled_from(sorted(tensors.DTYPES)),
    st.integers(0, 5),
    st.integers(1, 7),
    st.integers(0, 1 << 16),
    st.booleans(),
)
def test_rows_survive_the_trip_in_every_dtype(dtype: str, count: int, hidden: int, seed: int, writable: bool) -> None:
    rows = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(tensors.DTYPES[dtype])
    payload = bytes(tensors.pack(rows, dtype))
    back = tensors.unpack(bytearray(payload) if writable else payload, dtype=dtype, count=count, hidden=hidden)
    assert back.dtype == rows.dtype
    assert torch.equal(back, rows)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", sorted(tensors.DTYPES))
def test_values_that_are_not_finite_are_refused(dtype: str, poison: float) -> None:
    rows = torch.zeros(2, 3)
    rows[1, 2] = poison
    with pytest.raises(ProtocolError, match="not finite"):
        tensors.unpack(bytes(tensors.pack(rows, dtype)), dtype=dtype, count=2, hidden=3)


@pytest.mark.parametrize("dtype", sorted(tensors.DTYPES))
def test_rows_fill_the_room_that_was_made_for_them_if_they_fit(dtype: str) -> None:
    rows = torch.randn(1, 3).to(tensors.DTYPES[dtype])
    for room in (
        tensors.Room(1, 3, rows.dtype),
        tensors.Room(2, 3, rows.dtype),
        tensors.Room(3, 1, rows.dtype),
        tensors.Room(1, 3, torch.float64),
        None,
    ):
        back = tensors.unpack(tensors.pack(rows, dtype), dtype=dtype, count=1, hidden=3, room=room)
        assert torch.equal(back, rows)
    room = tensors.Room(1, 3, rows.dtype)
    with pytest.raises(ProtocolError):
        tensors.unpack(b"\xff" * (3 * rows.itemsize), dtype=dtype, count=1, hidden=3, room=room)


@given(st.sampled_from(sorted(tensors.DTYPES)), st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=9))
@example("float32", [b"\x00\x00\x80\x7f"])
@example("float32", [b"\xff\xff\x7f\xff"] * 2)
@example("bfloat16", [b"\x7f\x7f\x80\xff"])
@example("float16", [b"\xff\x7b\x00\x7c"])
def test_bytes_of_few_values_are_finite_if_each_of_them_is(dtype: str, words: list[bytes]) -> None:
    payload = b"".join(words)
    values = torch.frombuffer(bytearray(payload), dtype=tensors.DTYPES[dtype])
    assert tensors.finite_in(payload, dtype) == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("poison", [1.0, float("nan")])
def test_bytes_of_many_values_are_finite_if_each_of_them_is(poison: float) -> None:
    rows = torch.zeros(2, tensors.COPIED_BYTES)
    rows[1, -1] = poison
    assert tensors.finite_in(tensors.pack(rows, "float32"), "float32") == math.isfinite(poison)


@given(st.sampled_from(sorted(tensors.DTYPES)), st.sampled_from(sorted(tensors.DTYPES)), st.integers(1, 5))
def test_converted_rows_are_what_torch_makes_of_them(dtype: str, to: str, count: int) -> None:
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count)).to(tensors.DTYPES[dtype])
    payload = tensors.converted(tensors.pack(rows, dtype), dtype=dtype, to=to, hidden=3)
    assert torch.equal(tensors.unpack(payload, dtype=to, count=count, hidden=3), rows.to(tensors.DTYPES[to]))


@pytest.mark.parametrize(("dtype", "count", "hidden"), [("float64", 1, 2), ("float32", 2, 2), ("float32", 1 << 24, 1)])
def test_a_wrong_dtype_or_length_is_refused(dtype: str, count: int, hidden: int) -> None:
    with pytest.raises(ProtocolError):
        tensors.unpack(bytes(8), dtype=dtype, count=count, hidden=hidden)
