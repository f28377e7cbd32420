"""Announcements and the exact signed bytes in which they travel.

Owns the layout, the bounds of every field, the DHT keys and the verdict on a value that a stranger hands over. Knows
no network and no clock: the time is an argument.

Layout of a value, at most MAX_RECORD_BYTES:

    byte 0        format, 1
    bytes 1-64    Ed25519 signature by the announcing peer
    bytes 65-     body: a MessagePack array in the order of `_Body` (later versions append fields; who does not know
                  them ignores them)

The signature's domain is `hive/record/1`; its message is the length of the key (2 bytes, big-endian), the key, the
length of the subkey (2 bytes), the subkey, and the body with sequence and expiry in it. So a value is worthless under
another key, another subkey or another expiry, and an old one cannot be given a later expiry by whoever stores it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

import msgpack
import msgspec

from routing.addresses import peer_id_in, validate_multiaddr
from routing.coordinates import Coordinate, check_coordinate
from routing.errors import CallerError, InvalidRecord
from routing.identity import SIGNATURE_BYTES, SigningKey, public_key_of, verify
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId

RECORD_LIFETIME_S: Final = 20.0
RECORD_RENEW_S: Final = 6.0
"""Three chances to renew before a record expires."""
MAX_EXPIRY_AHEAD_S: Final = 300.0
CLOCK_SLACK_S: Final = 10.0

MAX_RECORD_BYTES: Final = 1024
KEYS_PER_MODEL: Final = 16
MAX_RECORDS_PER_KEY: Final = 800
"""With subkey, expiry and framing a record takes up to 1.2 KB in an answer: 800 of them stay below 1 MiB."""

MAX_BLOCKS: Final = 4096
MAX_ADDRESSES: Final = 8
MAX_MODEL_NAME_CHARS: Final = 96
MAX_CACHE_TOKENS: Final = 2**40
MAX_SECONDS_PER_BLOCK: Final = 3600.0
MAX_BYTES_PER_S: Final = 2**50
MAX_QUEUE_S: Final = 3600.0
MAX_SESSIONS: Final = 2**20
MAX_ADAPTERS: Final = 4
ADAPTER_DIGEST_BYTES: Final = 16
DIGEST_DIGITS: Final = 12
"""Of an adapter's digest, where people are shown it."""

_FORMAT: Final = 1
_DOMAIN: Final = b"hive/record/1"
_HEADER_BYTES: Final = 1 + SIGNATURE_BYTES
_NETWORK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}", re.ASCII)
_ADAPTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", re.ASCII)
_KEY: Final = re.compile(rf"hive/1/({_NETWORK.pattern})/(?:model/([0-9a-f]{{64}})|index)/(?:0|[1-9][0-9]?)", re.ASCII)


class HostedAdapter(NamedTuple):
    """An adapter of the model that a peer computes with for whoever asks it to."""

    name: str
    digest: bytes
    """Of what it is: the same at every peer that hosts the same, whatever they call it."""

    def __str__(self) -> str:
        return f"{self.name}@{self.digest.hex()[:DIGEST_DIGITS]}"


class PeerState(StrEnum):
    """What a peer says about itself; only ONLINE peers are given new work."""

    JOINING = "joining"
    ONLINE = "online"
    PAUSED = "paused"
    """Its owner needs the machine; it comes back by itself."""
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What one peer serves, as the peer itself says. Speeds and free space are claims, not facts.

    Raises CallerError (also InvalidSpan, InvalidAddress) when a field is out of bounds.
    """

    peer_id: PeerId
    model: ModelId
    model_name: str
    """For people; what decides is `model`."""
    num_blocks: int
    """Blocks of the whole model."""
    spans: BlockSpans
    state: PeerState
    dtype: str
    quantization: str = "none"
    version: str
    """Of the software."""
    protocol: int
    """Of the wire."""
    name: str = ""
    addresses: tuple[str, ...]
    """Canonical and dialable, each ending in this peer's id; none while the peer cannot be reached."""
    decode_s_per_block: float
    """One token through one block."""
    prefill_s_per_token_block: float
    """One more token of a long step through one block."""
    cache_tokens: int
    """KV positions this peer has room for in all."""
    free_tokens: int
    max_bytes_per_s: int = 0
    """Which this peer's owner allows it each way; 0: no bound is set."""
    uplink_bytes_per_s: int = 0
    """That its large sends lately reached at best, in coarse steps; 0: not known, or no less than anybody assumes."""
    queue_s: float = 0.0
    """What a step waits here before it is computed, lately."""
    sessions: int = 0
    """Held here now."""
    place: Coordinate | None = None
    """Where it is among others, by the round trips that it measured; None where it does not say."""
    max_blocks: int = 0
    """So many blocks fit here, and it may be asked to serve others than now; 0: what it serves was chosen for it."""
    adapters: tuple[HostedAdapter, ...] = ()
    """For its blocks."""
    intent: BlockSpan | None = None
    """It is about to serve these blocks instead, or where it joins at all, unless a peer with a smaller id intends the
    same."""
    sequence: int
    """Grows with every record of this peer; the highest wins."""
    expires_at_s: float
    """Seconds since the epoch."""
    numbers: bytes = field(init=False, repr=False, compare=False)
    """What plans look at in thousands of records at once, as doubles: see `_NUMBERS`."""

    def hosts(self, adapter: bytes) -> bool:
        """Whether an adapter of this digest is among its own."""
        return any(hosted.digest == adapter for hosted in self.adapters)

    def __post_init__(self) -> None:
        public_key_of(self.peer_id)
        _check_text("model name", self.model_name, max_chars=MAX_MODEL_NAME_CHARS, min_chars=1)
        _check_text("dtype", self.dtype, max_chars=16, min_chars=1)
        _check_text("quantization", self.quantization, max_chars=32, min_chars=1)
        _check_text("version", self.version, max_chars=32, min_chars=1)
        check_peer_name(self.name)
        _check_number("number of blocks", self.num_blocks, 1, MAX_BLOCKS)
        _check_number("end of the spans", self.spans.end, 1, self.num_blocks)
        _check_number("protocol", self.protocol, 0, 2**16 - 1)
        _check_number("seconds per block", self.decode_s_per_block, 0, MAX_SECONDS_PER_BLOCK)
        _check_number("seconds per token and block", self.prefill_s_per_token_block, 0, MAX_SECONDS_PER_BLOCK)
        _check_number("cache size", self.cache_tokens, 0, MAX_CACHE_TOKENS)
        _check_number("free cache", self.free_tokens, 0, self.cache_tokens)
        _check_number("bytes per second", self.max_bytes_per_s, 0, MAX_BYTES_PER_S)
        _check_number("bytes per second of the uplink", self.uplink_bytes_per_s, 0, MAX_BYTES_PER_S)
        _check_number("sessions", self.sessions, 0, MAX_SESSIONS)
        _check_number("queue", self.queue_s, 0, MAX_QUEUE_S)
        _check_number("blocks that fit", self.max_blocks, 0, self.num_blocks)
        _check_number("number of adapters", len(self.adapters), 0, MAX_ADAPTERS)
        for adapter in self.adapters:
            check_adapter_name(adapter.name)
            _check_number("bytes of an adapter's digest", len(adapter.digest), *[ADAPTER_DIGEST_BYTES] * 2)
        if self.place is not None:
            check_coordinate(self.place)
        if self.intent is not None:
            _check_number("end of the intended span", self.intent.end, 1, self.num_blocks)
        _check_number("sequence", self.sequence, 0, 2**63 - 1)
        _check_number("expiry", self.expires_at_s, 0, 2**53)
        _check_number("number of addresses", len(self.addresses), 0, MAX_ADDRESSES)
        for address in self.addresses:
            if validate_multiaddr(address, need_peer_id=True) != address or peer_id_in(address) != self.peer_id:
                raise CallerError(f"{address!r} is not a canonical address of peer {self.peer_id}")
        first, place = self.spans.parts[0], self.place or _NOWHERE
        numbers = _NUMBERS.pack(
            len(self.spans.parts), first.start, first.end, self.spans.num_blocks,
            self.decode_s_per_block, self.prefill_s_per_token_block, self.queue_s, self.sessions,
            self.max_bytes_per_s, self.uplink_bytes_per_s, self.free_tokens, *place,
        )  # fmt: skip
        object.__setattr__(self, "numbers", numbers)


NUMBERS: Final = 15
_NUMBERS: Final = struct.Struct(f"={NUMBERS}d")
"""Spans, start and end of the first, blocks of all; speeds, queue and sessions; both bandwidths and the room; place."""
_NOWHERE: Final = Coordinate()
_model: Final = functools.lru_cache(maxsize=256)(ModelId)


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """The typed form of the signed array. The peer id is the subkey and ends every address: not repeated here.

    New fields go to the end and have a default: readers that know fewer ignore what follows, under the same signature,
    and those that know more read the default where a peer says nothing.
    """

    sequence: int
    expires_at_s: float
    model: bytes
    model_name: str
    num_blocks: int
    start: int
    end: int
    state: PeerState
    dtype: str
    quantization: str
    version: str
    protocol: int
    name: str
    addresses: tuple[str, ...]
    decode_s_per_block: float
    prefill_s_per_token_block: float
    cache_tokens: int
    free_tokens: int
    max_bytes_per_s: int = 0
    more_spans: tuple[tuple[int, int], ...] = ()
    """What the peer serves beyond `[start, end)`."""
    queue_s: float = 0.0
    sessions: int = 0
    place: tuple[float, float, float, float] | None = None
    max_blocks: int = 0
    intent: tuple[int, int] | None = None
    adapters: tuple[tuple[str, bytes], ...] = ()
    uplink_bytes_per_s: int = 0


def check_network(network: str) -> str:
    """The name itself, when it may stand in a key: 1 to 32 of `a-z 0-9 . _ -`. Raises CallerError."""
    if not _NETWORK.fullmatch(network):
        raise CallerError(
            f"{network[:64]!r} is not a network name", hint="use 1 to 32 lower-case letters, digits, '.', '_' and '-'"
        )
    return network


def check_peer_name(name: str) -> str:
    """The name itself, when a record can carry it. Raises CallerError."""
    _check_text("peer name", name, max_chars=48)
    return name


def check_adapter_name(name: str) -> str:
    """The name itself, when peers can be asked for it: 1 to 32 of `A-Z a-z 0-9 . _ -`. Raises CallerError."""
    if not _ADAPTER_NAME.fullmatch(name):
        raise CallerError(
            f"{name[:64]!r} is not a name of an adapter", hint="use 1 to 32 letters, digits, '.', '_' and '-'"
        )
    return name


def model_keys(network: str, model: ModelId) -> tuple[str, ...]:
    """Every key under which peers of this model announce. Raises CallerError on a bad network name."""
    return tuple(_key(network, f"model/{model.hex}", bucket) for bucket in range(KEYS_PER_MODEL))


def model_key(network: str, model: ModelId, peer_id: PeerId) -> str:
    """The one key under which this peer announces this model; it cannot choose its bucket."""
    return _key(network, f"model/{model.hex}", _bucket(peer_id))


def index_keys(network: str) -> tuple[str, ...]:
    """Every key under which all peers of the network announce, whatever they serve."""
    return tuple(_key(network, "index", bucket) for bucket in range(KEYS_PER_MODEL))


def index_key(network: str, peer_id: PeerId) -> str:
    """Where this peer announces a second time, so that readers learn which models exist."""
    return _key(network, "index", _bucket(peer_id))


def sign_record(announcement: Announcement, key: str, signing_key: SigningKey) -> bytes:
    """The value to store under `key` with the peer id as subkey, until `announcement.expires_at_s`.

    Raises CallerError when the key is not the announcing peer's, or the record would pass MAX_RECORD_BYTES.
    """
    _check_key(key, announcement)
    if signing_key.peer_id != announcement.peer_id:
        raise CallerError(f"peer {signing_key.peer_id} cannot sign for peer {announcement.peer_id}")
    body = _encode(announcement)
    size = _HEADER_BYTES + len(body)
    if size > MAX_RECORD_BYTES:
        raise CallerError(f"the record has {size} bytes, above {MAX_RECORD_BYTES}", hint="announce fewer addresses")
    signature = signing_key.sign(_DOMAIN, _message(key, announcement.peer_id, body))
    return bytes([_FORMAT]) + signature + body


def verify_record(value: bytes, *, key: str, subkey: str, stored_expiry_s: float, now_s: float) -> Announcement:
    """The announcement inside a value found under `key` and `subkey`, proven to be the subkey's owner's.

    Raises InvalidRecord, and nothing else, whatever the bytes; clock skew is named where it may be the reason.
    """
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidRecord(f"the record has {len(value)} bytes, above {MAX_RECORD_BYTES}")
    if len(value) <= _HEADER_BYTES or value[0] != _FORMAT:
        raise InvalidRecord(f"not a record of format {_FORMAT}")
    signature, body = value[1:_HEADER_BYTES], value[_HEADER_BYTES:]
    try:
        message = _message(key, subkey, body)
        if not verify(subkey, _DOMAIN, message, signature):
            raise InvalidRecord(f"the record is not signed by peer {subkey} for this key")
        announcement = _decode(PeerId(subkey), body)
        _check_key(key, announcement)
    except CallerError as error:
        raise InvalidRecord(f"the record is malformed: {error}") from error
    if announcement.expires_at_s != stored_expiry_s:
        raise InvalidRecord(f"the record of peer {subkey} is stored with another expiry than the signed one")
    ahead_s = announcement.expires_at_s - now_s
    if not ahead_s <= MAX_EXPIRY_AHEAD_S:
        raise InvalidRecord(
            f"the record of peer {subkey} expires {ahead_s:.0f} s ahead, above {MAX_EXPIRY_AHEAD_S:.0f} s",
            hint="clock skew? check the time synchronisation on both machines",
        )
    if ahead_s < -CLOCK_SLACK_S:
        raise InvalidRecord(
            f"the record of peer {subkey} expired {-ahead_s:.0f} s ago",
            hint="the peer is gone, or clock skew: check the time synchronisation on both machines",
        )
    return announcement


def _encode(announcement: Announcement) -> bytes:
    suffix = f"/p2p/{announcement.peer_id}"
    first, *more = announcement.spans
    body = _Body(
        sequence=announcement.sequence,
        expires_at_s=float(announcement.expires_at_s),
        model=announcement.model.digest,
        model_name=announcement.model_name,
        num_blocks=announcement.num_blocks,
        start=first.start,
        end=first.end,
        state=announcement.state,
        dtype=announcement.dtype,
        quantization=announcement.quantization,
        version=announcement.version,
        protocol=announcement.protocol,
        name=announcement.name,
        addresses=tuple(address.removesuffix(suffix) for address in announcement.addresses),
        decode_s_per_block=announcement.decode_s_per_block,
        prefill_s_per_token_block=announcement.prefill_s_per_token_block,
        cache_tokens=announcement.cache_tokens,
        free_tokens=announcement.free_tokens,
        max_bytes_per_s=announcement.max_bytes_per_s,
        more_spans=tuple((span.start, span.end) for span in more),
        queue_s=announcement.queue_s,
        sessions=announcement.sessions,
        place=announcement.place,
        max_blocks=announcement.max_blocks,
        intent=None if announcement.intent is None else (announcement.intent.start, announcement.intent.end),
        adapters=tuple((adapter.name, adapter.digest) for adapter in announcement.adapters),
        uplink_bytes_per_s=announcement.uplink_bytes_per_s,
    )
    packed: bytes = msgpack.packb(msgspec.to_builtins(body, builtin_types=(bytes,)))
    return packed


def _decode(peer_id: PeerId, body: bytes) -> Announcement:
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_RECORD_BYTES,
        max_str_len=512,
        max_bin_len=64,
        max_array_len=64,
        max_map_len=16,
        max_ext_len=0,
    )
    unpacker.feed(body)
    try:
        fields = msgspec.convert(unpacker.unpack(), _Body)
    except (msgpack.UnpackException, ValueError, msgspec.ValidationError) as error:
        raise CallerError(f"the body cannot be read ({type(error).__name__})") from error
    if unpacker.tell() != len(body):
        raise CallerError("bytes follow the body")
    return Announcement(
        peer_id=peer_id,
        model=_model(fields.model),
        model_name=fields.model_name,
        num_blocks=fields.num_blocks,
        spans=BlockSpans(tuple(BlockSpan(*ends) for ends in ((fields.start, fields.end), *fields.more_spans))),
        state=fields.state,
        dtype=fields.dtype,
        quantization=fields.quantization,
        version=fields.version,
        protocol=fields.protocol,
        name=fields.name,
        addresses=tuple(f"{address}/p2p/{peer_id}" for address in fields.addresses),
        decode_s_per_block=fields.decode_s_per_block,
        prefill_s_per_token_block=fields.prefill_s_per_token_block,
        cache_tokens=fields.cache_tokens,
        free_tokens=fields.free_tokens,
        max_bytes_per_s=fields.max_bytes_per_s,
        uplink_bytes_per_s=fields.uplink_bytes_per_s,
        queue_s=fields.queue_s,
        sessions=fields.sessions,
        place=None if fields.place is None else Coordinate(*fields.place),
        max_blocks=fields.max_blocks,
        intent=None if fields.intent is None else BlockSpan(*fields.intent),
        adapters=tuple(HostedAdapter(*adapter) for adapter in fields.adapters),
        sequence=fields.sequence,
        expires_at_s=fields.expires_at_s,
    )


def _message(key: str, subkey: str, body: bytes) -> bytes:
    public_key_of(subkey)
    _parse_key(key)
    key_raw, subkey_raw = key.encode("ascii"), subkey.encode("ascii")
    return len(key_raw).to_bytes(2, "big") + key_raw + len(subkey_raw).to_bytes(2, "big") + subkey_raw + body


def _key(network: str, topic: str, bucket: int) -> str:
    return f"hive/1/{check_network(network)}/{topic}/{bucket}"


def _bucket(peer_id: PeerId) -> int:
    return int.from_bytes(hashlib.sha256(peer_id.encode("ascii")).digest()[:8], "big") % KEYS_PER_MODEL


def _parse_key(key: str) -> tuple[str, str | None]:
    """The network, and the model's hex digits unless the key is the index's."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise CallerError(f"{key[:128]!r} is not a key of this network")
    return match[1], match[2]


def _check_key(key: str, announcement: Announcement) -> None:
    network, model_hex = _parse_key(key)
    expected = (
        index_key(network, announcement.peer_id)
        if model_hex is None
        else model_key(network, announcement.model, announcement.peer_id)
    )
    if key != expected:
        raise CallerError(f"peer {announcement.peer_id} announces under {expected}, not under {key}")


def _check_text(what: str, text: str, *, max_chars: int, min_chars: int = 0) -> None:
    # `isprintable` is false for control characters, line separators and the marks that reverse a terminal's text.
    if not (min_chars <= len(text) <= max_chars and text.isprintable()):
        raise CallerError(
            f"the {what} must have {min_chars} to {max_chars} printable characters",
            hint="choose a shorter one without control characters",
        )


def _check_number(what: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise CallerError(f"the {what} must be between {least} and {most}")
