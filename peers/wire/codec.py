"""Messages ⇄ frames: one typed, size-bounded decoder for everything that strangers send.

    frame = header length (4 bytes, big-endian, <= MAX_HEADER_BYTES) ‖ header (MessagePack map) ‖ payload (raw rows)

The payload is interpreted by `peers.wire.tensors` with the dtype and shape that the header names, and must be empty
for messages that carry no tensor.
"""

from __future__ import annotations

import struct
from typing import get_args

import msgpack
import msgspec

from peers.errors import ProtocolError
from peers.wire.messages import AnyMessage, Relay, Result, Step

MAX_HEADER_BYTES = 32 * 1024
_LENGTH = struct.Struct(">I")
_BY_TAG: dict[str, type[AnyMessage]] = {kind.__struct_config__.tag: kind for kind in get_args(AnyMessage)}

Buffer = bytes | bytearray | memoryview


def encode(message: AnyMessage) -> bytes:
    """The frame's head (length and header); the payload, if any, follows it in the same frame."""
    header: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)), use_bin_type=True)
    assert len(header) <= MAX_HEADER_BYTES, f"{type(message).__name__} header of {len(header)} bytes"
    return _LENGTH.pack(len(header)) + header


def decode(frame: Buffer) -> tuple[AnyMessage, memoryview]:
    """One frame as a typed message and its payload (a view into `frame`, empty where the message carries no tensor).

    Raises ProtocolError for anything that `encode` of this protocol version would not have produced, save for map
    fields that it does not know, which are ignored so that later versions may add some.
    """
    view = memoryview(frame)
    if len(view) < _LENGTH.size:
        raise ProtocolError("a frame shorter than its own length field")
    (header_bytes,) = _LENGTH.unpack_from(view)
    if header_bytes > MAX_HEADER_BYTES or header_bytes > len(view) - _LENGTH.size:
        raise ProtocolError(f"a header of {header_bytes} bytes in a frame of {len(view)}")
    payload = view[_LENGTH.size + header_bytes :]
    try:
        fields = msgpack.unpackb(
            view[_LENGTH.size : _LENGTH.size + header_bytes],
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=MAX_HEADER_BYTES,
            max_array_len=1024,
            max_map_len=64,
            max_ext_len=0,
        )
        # one class instead of the union: msgspec keeps what it learns of a class, but not of a union
        kind = _BY_TAG[fields["t"]]
        message: AnyMessage = msgspec.convert(fields, kind, builtin_types=(bytes,))
    # unpackb's documented errors are ValueError's family; odd shapes, deep nesting and unknown tags add the others
    except (
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
        msgpack.exceptions.UnpackException,
        msgspec.ValidationError,
    ) as error:
        raise ProtocolError(f"an unreadable message: {error}") from error
    if len(payload) and not isinstance(message, Step | Relay | Result):
        raise ProtocolError(f"{type(message).__name__} with {len(payload)} bytes of payload")
    return message, payload
