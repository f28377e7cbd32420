"""Messages ⇄ frames: one typed, size-bounded decoder for everything that strangers send.

    frame   = one or more messages
    message = its length (4 bytes, big-endian) ‖ header length (4 bytes, <= MAX_HEADER_BYTES)
              ‖ header (MessagePack map) ‖ payload (raw rows)

What is sent together travels in one frame: it arrives together, and steps of many sessions find one forward. A payload
is interpreted by `peers.wire.tensors` with the dtype and shape that the header names, and must be empty
for messages that carry no tensor.
"""

from __future__ import annotations

import struct

import msgspec

from peers.errors import ProtocolError
from peers.wire.messages import Adapter, AdapterGradient, AnyMessage, Relay, Result, Step, Train, Trained

MAX_HEADER_BYTES = 32 * 1024
_LENGTHS = struct.Struct(">II")
_LENGTH_BYTES = 4
OVERHEAD_BYTES = _LENGTHS.size + MAX_HEADER_BYTES
"""The most that a message takes besides its payload."""
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)

CARRY_ROWS = (Step, Relay, Result, Train, Trained, Adapter, AdapterGradient)
"""Messages that may have a payload."""

Buffer = bytes | bytearray | memoryview


def encode(message: AnyMessage, payload_bytes: int = 0) -> bytes:
    """A message's head (lengths and header); its payload of `payload_bytes`, if any, follows it in the same frame."""
    header = _ENCODER.encode(message)
    assert len(header) <= MAX_HEADER_BYTES, f"{type(message).__name__} header of {len(header)} bytes"
    return _LENGTHS.pack(_LENGTH_BYTES + len(header) + payload_bytes, len(header)) + header


def decode(frame: Buffer) -> list[tuple[AnyMessage, memoryview]]:
    """A frame's messages, each typed and with its payload (a view into `frame`, empty where it carries no tensor).

    Raises ProtocolError for anything that `encode` of this protocol version would not have produced, save for map
    fields that it does not know, which are ignored so that later versions may add some.
    """
    messages: list[tuple[AnyMessage, memoryview]] = []
    view = memoryview(frame)
    while not messages or len(view):
        if len(view) < _LENGTHS.size:
            raise ProtocolError("a message shorter than its own length fields")
        message_bytes, header_bytes = _LENGTHS.unpack_from(view)
        end = _LENGTH_BYTES + message_bytes
        if header_bytes > MAX_HEADER_BYTES or _LENGTHS.size + header_bytes > end or end > len(view):
            raise ProtocolError(
                f"a header of {header_bytes} bytes in a message of {message_bytes}, {len(view)} of which came"
            )
        payload_at = _LENGTHS.size + header_bytes
        messages.append((_message(view[_LENGTHS.size : payload_at], end - payload_at), view[payload_at:end]))
        view = view[end:]
    return messages


def _message(header: memoryview, payload_bytes: int) -> AnyMessage:
    try:
        message: AnyMessage = _DECODER.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # the last from nesting that is ignored
        raise ProtocolError(f"an unreadable message: {error}") from error
    if payload_bytes and not isinstance(message, CARRY_ROWS):
        raise ProtocolError(f"{type(message).__name__} with {payload_bytes} bytes of payload")
    return message
