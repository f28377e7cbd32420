from __future__ import annotations

import hashlib
import random
from dataclasses import fields, replace
from itertools import starmap

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.coordinates import Coordinate
from routing.errors import CallerError, InvalidRecord
from routing.identity import SigningKey
from routing.ids import MAX_SPANS, BlockSpan, BlockSpans, ModelId
from routing.records import (
    CLOCK_SLACK_S,
    KEYS_PER_MODEL,
    MAX_ADAPTERS,
    MAX_BLOCKS,
    MAX_BYTES_PER_S,
    MAX_EXPIRY_AHEAD_S,
    MAX_RECORD_BYTES,
    MAX_RECORDS_PER_KEY,
    Announcement,
    HostedAdapter,
    PeerState,
    index_key,
    index_keys,
    model_key,
    model_keys,
    sign_record,
    verify_record,
)
from tests.routing.swarms import MODEL, NOW_S, OTHER_MODEL, announcement, key, peer

OWNER = key(1)
RECORD = announcement(OWNER.peer_id, name="Anna's attic")
KEY = model_key("main", MODEL, OWNER.peer_id)
VALUE = sign_record(RECORD, KEY, OWNER)


def verdict(value: bytes = VALUE, **changes: object) -> Announcement:
    where: dict[str, object] = {
        "key": KEY,
        "subkey": OWNER.peer_id,
        "stored_expiry_s": RECORD.expires_at_s,
        "now_s": NOW_S,
    }
    return verify_record(value, **where | changes)  # type: ignore[arg-type]


def signed_body(body: object, *, raw: bytes | None = None, signer: SigningKey = OWNER, record_key: str = KEY) -> bytes:
    """A value with a true signature over any body: what a malicious owner of a key can make."""
    packed = msgpack.packb(body) if raw is None else raw
    message = len(record_key).to_bytes(2, "big") + record_key.encode()
    message += len(signer.peer_id).to_bytes(2, "big") + signer.peer_id.encode() + packed
    return b"\x01" + signer.sign(b"hive/record/1", message) + packed


def body_of(value: bytes) -> list[object]:
    body: list[object] = msgpack.unpackb(value[65:])
    return body


FIELD = {name: index for index, name in enumerate([
    "sequence", "expires_at_s", "model", "model_name", "num_blocks", "start", "end", "state", "dtype", "quantization",
    "version", "protocol", "name", "addresses", "decode_s_per_block", "prefill_s_per_token_block", "cache_tokens",
    "free_tokens", "max_bytes_per_s", "more_spans", "queue_s", "sessions", "place", "max_blocks", "intent",
    "adapters", "uplink_bytes_per_s",
])}  # fmt: skip


def with_field(name: str, content: object) -> bytes:
    body = body_of(VALUE)
    body[FIELD[name]] = content
    return signed_body(body)


def spans_within(blocks: int, edges: list[int]) -> BlockSpans:
    """Between every second pair of neighbouring `edges`, or everything."""
    inside = sorted({edge % (blocks + 1) for edge in edges})
    return BlockSpans(
        tuple(starmap(BlockSpan, zip(inside[::2], inside[1::2], strict=False))) or (BlockSpan(0, blocks),)
    )


TEXTS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=16)
DIGESTS = st.binary(min_size=16, max_size=16)
ANNOUNCEMENTS = st.builds(
    lambda number, blocks, edges, cache, used, **rest: announcement(
        key(number).peer_id,
        num_blocks=blocks,
        spans=spans_within(blocks, edges),
        cache_tokens=cache,
        free_tokens=max(0, cache - used),
        **rest,
    ),
    number=st.integers(1, 5),
    blocks=st.integers(1, MAX_BLOCKS),
    edges=st.lists(st.integers(0, MAX_BLOCKS), min_size=2, max_size=2 * MAX_SPANS),
    cache=st.integers(0, 10**9),
    used=st.integers(0, 10**9),
    model=st.binary(min_size=32, max_size=32).map(ModelId),
    model_name=TEXTS,
    state=st.sampled_from(PeerState),
    dtype=TEXTS,
    quantization=TEXTS,
    version=TEXTS,
    name=TEXTS,
    protocol=st.integers(0, 65535),
    decode_s_per_block=st.floats(0, 3600),
    prefill_s_per_token_block=st.floats(0, 3600),
    max_bytes_per_s=st.integers(0, MAX_BYTES_PER_S),
    uplink_bytes_per_s=st.integers(0, MAX_BYTES_PER_S),
    queue_s=st.floats(0, 3600),
    place=st.none() | st.builds(Coordinate, *[st.floats(-9, 9)] * 2, st.floats(0, 9), st.floats(0, 1)),
    adapters=st.lists(
        st.builds(HostedAdapter, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", fullmatch=True), DIGESTS),
        max_size=MAX_ADAPTERS,
    ).map(tuple),
    sequence=st.integers(0, 2**63 - 1),
    expires_at_s=st.floats(NOW_S - CLOCK_SLACK_S, NOW_S + MAX_EXPIRY_AHEAD_S),
)


@given(ANNOUNCEMENTS)
def test_what_is_signed_is_what_is_read(said: Announcement) -> None:
    signer = next(key(n) for n in range(1, 6) if key(n).peer_id == said.peer_id)
    for where in (model_key("main", said.model, said.peer_id), index_key("main", said.peer_id)):
        value = sign_record(said, where, signer)
        assert len(value) <= MAX_RECORD_BYTES
        read = verify_record(value, key=where, subkey=said.peer_id, stored_expiry_s=said.expires_at_s, now_s=NOW_S)
        assert read == said


def test_a_typical_record_is_small() -> None:
    assert len(VALUE) < 256


def test_the_layout_is_the_documented_one() -> None:
    assert VALUE[0] == 1
    assert signed_body(body_of(VALUE)) == VALUE
    assert len(body_of(VALUE)) == len(FIELD)


def test_a_record_of_a_version_that_knew_fewer_fields_or_knows_more_is_read() -> None:
    body = body_of(VALUE)
    assert verdict(signed_body(body[: FIELD["max_bytes_per_s"]])) == RECORD
    assert verdict(signed_body([*body, "a field of tomorrow"])) == RECORD


@given(st.binary(max_size=1100))
def test_random_bytes_raise_invalid_record_only(value: bytes) -> None:
    with pytest.raises(InvalidRecord):
        verdict(value)


@given(st.binary(max_size=959))
def test_random_bytes_with_a_true_signature_raise_invalid_record_only(body: bytes) -> None:
    with pytest.raises(InvalidRecord):
        verdict(signed_body(None, raw=body))


@given(st.data())
def test_a_record_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    value = bytearray(VALUE)
    position = data.draw(st.integers(0, len(value) - 1))
    value[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidRecord):
        verdict(bytes(value))


@given(st.data())
def test_a_mutated_body_signed_again_by_its_owner_never_raises_anything_else(data: st.DataObject) -> None:
    junk = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=40)
        | st.binary(max_size=40),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    )
    body = body_of(VALUE)
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(junk)
    try:
        read = verdict(signed_body(body))
    except InvalidRecord:
        return
    assert read.expires_at_s == RECORD.expires_at_s
    assert read.peer_id == OWNER.peer_id


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_key_and_subkey_raise_invalid_record_only(any_key: str, any_subkey: str) -> None:
    with pytest.raises(InvalidRecord):
        verdict(key=any_key)
    with pytest.raises(InvalidRecord):
        verdict(subkey=any_subkey)


def test_bombs_are_refused_before_they_unfold() -> None:
    bombs = [
        b"\x91" * 950,  # arrays within arrays
        b"\x81\xa1a" * 300,  # maps within maps
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 entries
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",  # a text of 4 GiB
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        msgpack.packb("a" * 900),
        msgpack.packb([0] * 900),
    ]
    for bomb in bombs:
        with pytest.raises(InvalidRecord):
            verdict(signed_body(None, raw=bomb))


def test_bytes_behind_the_body_are_refused() -> None:
    with pytest.raises(InvalidRecord, match="follow"):
        verdict(signed_body(None, raw=VALUE[65:] + b"\x00"))


def test_fields_that_a_later_version_appends_are_ignored() -> None:
    assert verdict(signed_body([*body_of(VALUE), {"relay": True}, 7])) == RECORD


def test_another_peer_cannot_announce_overwrite_or_squat() -> None:
    thief = key(2)
    stolen = replace(RECORD, peer_id=thief.peer_id, addresses=())
    under_its_own_key = sign_record(stolen, model_key("main", MODEL, thief.peer_id), thief)
    with pytest.raises(InvalidRecord, match="not signed"):
        verdict(under_its_own_key)
    with pytest.raises(InvalidRecord, match="not signed"):
        verdict(subkey=thief.peer_id)
    with pytest.raises(InvalidRecord, match="not signed"):
        verdict(signed_body(body_of(VALUE), signer=thief))
    with pytest.raises(CallerError, match="cannot sign"):
        sign_record(RECORD, KEY, thief)


def test_a_record_moved_to_another_key_is_refused() -> None:
    elsewhere = [index_key("main", OWNER.peer_id), model_key("other", MODEL, OWNER.peer_id)]
    elsewhere += [other for other in model_keys("main", MODEL) if other != KEY]
    elsewhere += ["", "hive/1/main/model/", KEY + "\n", KEY.upper()]
    for other in elsewhere:
        with pytest.raises(InvalidRecord):
            verdict(key=other)


def test_not_even_its_owner_can_put_a_record_into_another_bucket_or_model() -> None:
    others = [other for other in model_keys("main", MODEL) if other != KEY]
    others += [model_key("main", OTHER_MODEL, OWNER.peer_id), "hive/1/main/index/99"]
    for other in others:
        with pytest.raises(InvalidRecord, match="announces under"):
            verdict(signed_body(body_of(VALUE), record_key=other), key=other)
        with pytest.raises(CallerError, match="announces under"):
            sign_record(RECORD, other, OWNER)


def test_a_record_stored_again_with_a_later_expiry_is_refused() -> None:
    for expiry_s in (RECORD.expires_at_s + 1, RECORD.expires_at_s - 1, float("inf"), float("nan")):
        with pytest.raises(InvalidRecord, match="another expiry"):
            verdict(stored_expiry_s=expiry_s)


def test_an_expiry_far_ahead_is_refused_and_clock_skew_is_named() -> None:
    assert verdict(now_s=RECORD.expires_at_s - MAX_EXPIRY_AHEAD_S) == RECORD
    with pytest.raises(InvalidRecord, match="ahead") as raised:
        verdict(now_s=RECORD.expires_at_s - MAX_EXPIRY_AHEAD_S - 1)
    assert "clock skew" in raised.value.hint


def test_an_expired_record_has_the_slack_of_unequal_clocks_and_then_skew_is_named() -> None:
    assert verdict(now_s=RECORD.expires_at_s + CLOCK_SLACK_S) == RECORD
    with pytest.raises(InvalidRecord, match="expired 11 s ago") as raised:
        verdict(now_s=RECORD.expires_at_s + CLOCK_SLACK_S + 1)
    assert "clock skew" in raised.value.hint


NAUGHTY_TEXTS = ["tab\t", "new\nline", "\x1b[31mred", "\u202ereversed", "nul\x00", "\u2028", "x" * 200]


@pytest.mark.parametrize("name", ["model_name", "name", "dtype", "quantization", "version"])
@pytest.mark.parametrize("text", NAUGHTY_TEXTS)
def test_texts_are_bounded_and_printable(name: str, text: str) -> None:
    with pytest.raises(CallerError):
        replace(RECORD, **{name: text})
    with pytest.raises(InvalidRecord):
        verdict(with_field(name, text))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sequence", -1),
        ("sequence", 2**63),
        ("sequence", True),
        ("sequence", "1"),
        ("expires_at_s", float("nan")),
        ("expires_at_s", float("inf")),
        ("model", b"short"),
        ("model", "\x11" * 32),
        ("num_blocks", 0),
        ("num_blocks", MAX_BLOCKS + 1),
        ("num_blocks", 9),
        ("start", -1),
        ("start", 10),
        ("end", 31),
        ("end", 0),
        ("state", "immortal"),
        ("protocol", -1),
        ("protocol", 2**16),
        ("addresses", ["not an address"]),
        ("addresses", ["/unix/tmp/socket"]),
        ("addresses", ["/ip4/0.0.0.0/tcp/1"]),
        ("addresses", ["/ip4/203.0.113.7/tcp/04001"]),
        ("addresses", ["/ip4/203.0.113.7/tcp/1"] * 9),
        ("addresses", [f"/ip4/203.0.113.7/tcp/1/p2p/{peer(2)}"]),
        ("addresses", None),
        ("decode_s_per_block", -0.1),
        ("decode_s_per_block", float("nan")),
        ("decode_s_per_block", float("inf")),
        ("prefill_s_per_token_block", float("nan")),
        ("prefill_s_per_token_block", 1e9),
        ("cache_tokens", -1),
        ("cache_tokens", 2**41),
        ("free_tokens", 8193),
        ("free_tokens", 1.5),
        ("max_bytes_per_s", -1),
        ("max_bytes_per_s", MAX_BYTES_PER_S + 1),
        ("uplink_bytes_per_s", -1),
        ("uplink_bytes_per_s", MAX_BYTES_PER_S + 1),
        ("queue_s", -1.0),
        ("sessions", -1),
        ("place", [0.0, 0.0, 0.0]),
        ("place", [float("nan"), 0.0, 0.0, 1.0]),
        ("place", [0.0, float("nan"), 0.0, 1.0]),
        ("place", [0.0, 0.0, -0.1, 1.0]),
        ("place", [0.0, 0.0, 0.0, 1.1]),
        ("place", [11.0, 0.0, 0.0, 1.0]),
        ("max_blocks", 31),
        ("intent", [20, 31]),
        ("intent", [5, 5]),
        ("more_spans", [[9, 12]]),
        ("more_spans", [[10, 12]]),
        ("more_spans", [[12, 12]]),
        ("more_spans", [[12, 31]]),
        ("more_spans", [[20, 22], [12, 14]]),
        ("more_spans", [[12 + 2 * n, 13 + 2 * n] for n in range(MAX_SPANS)]),
        ("more_spans", [[12]]),
        ("more_spans", [12, 13]),
    ],
)
def test_a_field_out_of_bounds_is_refused_even_when_its_owner_signed_it(name: str, content: object) -> None:
    with pytest.raises(InvalidRecord):
        verdict(with_field(name, content))


def test_an_announcement_with_another_peers_address_cannot_exist() -> None:
    with pytest.raises(CallerError, match="canonical address"):
        replace(RECORD, addresses=(f"/ip4/203.0.113.7/tcp/1/p2p/{peer(2)}",))


def test_a_record_above_the_size_limit_is_neither_made_nor_read() -> None:
    relay = f"/dns4/{'a' * 40}.{'b' * 40}.example.org/tcp/4001/p2p/{peer(9)}/p2p-circuit/p2p/{OWNER.peer_id}"
    with pytest.raises(CallerError, match="1024"):
        sign_record(replace(RECORD, addresses=(relay,) * 8), KEY, OWNER)
    with pytest.raises(InvalidRecord, match="1024"):
        verdict(VALUE + bytes(MAX_RECORD_BYTES))


def test_keys_name_the_network_the_model_and_the_bucket_of_the_peer() -> None:
    bucket = int.from_bytes(hashlib.sha256(OWNER.peer_id.encode()).digest()[:8], "big") % KEYS_PER_MODEL
    assert f"hive/1/main/model/{MODEL.hex}/{bucket}" == KEY
    assert index_key("main", OWNER.peer_id) == f"hive/1/main/index/{bucket}"
    assert model_keys("main", MODEL)[bucket] == KEY
    assert index_keys("main")[bucket] == index_key("main", OWNER.peer_id)
    assert len(set(model_keys("main", MODEL))) == len(set(index_keys("main"))) == KEYS_PER_MODEL


@pytest.mark.parametrize("network", ["", "Main", "a/b", "a b", "-a", "a" * 33, "é", "a\n"])
def test_a_network_name_that_cannot_stand_in_a_key_is_the_callers_error(network: str) -> None:
    with pytest.raises(CallerError, match="network name"):
        model_keys(network, MODEL)


def test_five_thousand_strangers_leave_room_under_every_key_and_no_answer_passes_a_mebibyte() -> None:
    rng = random.Random(5)
    keys = model_keys("main", MODEL)
    crowd = dict.fromkeys(keys, 0)
    for number in rng.sample(range(10**6), 5000):
        crowd[model_key("main", MODEL, peer(number))] += 1
    assert max(crowd.values()) < MAX_RECORDS_PER_KEY / 2
    per_record_bytes = MAX_RECORD_BYTES + len(OWNER.peer_id) + 3 * 9 + 64
    assert MAX_RECORDS_PER_KEY * per_record_bytes < 2**20


def test_every_field_of_an_announcement_travels() -> None:
    changed = replace(
        RECORD, model=OTHER_MODEL, model_name="other", num_blocks=31, spans=BlockSpans.parse("3:4,6:9"),
        state=PeerState.DRAINING, dtype="int8", quantization="nf4", version="9", protocol=7, name="other", addresses=(),
        decode_s_per_block=0.5, prefill_s_per_token_block=0.25, cache_tokens=6, free_tokens=5, max_bytes_per_s=8,
        uplink_bytes_per_s=9,
        queue_s=0.5, sessions=3, place=Coordinate(0.1, -0.2, 0.001, 0.25), max_blocks=7, intent=BlockSpan(5, 9),
        adapters=(HostedAdapter("poet", bytes(16)),),
        sequence=4, expires_at_s=NOW_S + 3,
    )  # fmt: skip
    for field in fields(Announcement):
        if field.name != "peer_id":
            assert getattr(changed, field.name) != getattr(RECORD, field.name)
    where = model_key("main", OTHER_MODEL, OWNER.peer_id)
    value = sign_record(changed, where, OWNER)
    assert verdict(value, key=where, stored_expiry_s=changed.expires_at_s) == changed


def test_records_of_one_model_share_its_id() -> None:
    read = [
        verify_record(value, key=under, subkey=said.peer_id, stored_expiry_s=said.expires_at_s, now_s=NOW_S)
        for said, by in ((announcement(key(number).peer_id), key(number)) for number in (1, 2))
        for under in [model_key("main", MODEL, said.peer_id)]
        for value in [sign_record(said, under, by)]
    ]
    assert read[0].model is read[1].model
