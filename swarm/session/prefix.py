"""Keys for what a session holds at a hop, which nobody can make without the secret of whoever opens it.

Owns what a key commits to: everything that decides the hop's positions up to the end of one block. Equal keys are equal
positions; and as a hop sees nothing but keyed hashes, it cannot try out what a prompt might have been. Knows neither
sessions nor links.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

import torch

from peers.wire.messages import MAX_PREFIX_KEYS, PREFIX_POSITIONS
from routing.ids import ModelId
from routing.routes import Hop
from swarm.session.history import Segment


def describe_blocks(segments: Iterable[Segment], regime_key: Callable[[int], object]) -> list[bytes]:
    """What enters block 0 of the model at each whole block of positions from 0 on, up to the first embedding that came
    without a token id."""
    ids: list[torch.Tensor] = []
    starts: list[int] = []
    marks: list[tuple[int, object]] = []  # what holds from each of `starts` on
    end = 0
    for segment in segments:
        if segment.token_ids is None or end >= MAX_PREFIX_KEYS * PREFIX_POSITIONS:
            break
        mark = (segment.position_offset, regime_key(segment.regime_length))
        if not marks or marks[-1] != mark:
            starts.append(end)
            marks.append(mark)
        ids.append(segment.token_ids)
        end += segment.count
    whole = min(end // PREFIX_POSITIONS, MAX_PREFIX_KEYS) * PREFIX_POSITIONS
    if not whole:
        return []
    id_bytes, width = torch.cat(ids).to(torch.int64).numpy().tobytes(), torch.int64.itemsize
    blocks = []
    for start in range(0, whole, PREFIX_POSITIONS):
        stop = start + PREFIX_POSITIONS
        within = range(bisect_right(starts, start) - 1, bisect_left(starts, stop))
        how = repr([(max(0, starts[at] - start), *marks[at]) for at in within])
        blocks.append(how.encode() + id_bytes[start * width : stop * width])
    return blocks


def prefix_keys(
    secret: bytes,
    model: ModelId,
    wire_dtype: str,
    upstream: Sequence[Hop],
    blocks: Iterable[bytes],
    adapter: bytes | None = None,
) -> tuple[bytes, ...]:
    """A key for each of `blocks` at the hop that follows `upstream`.

    Hops before it, and the dtypes in which they compute and send, decide what arrives there, and so differs what it
    holds; so does what `adapter`, by its name, adds in them. A key also commits to all blocks before its own.
    """
    hops = [(hop.peer_id, hop.span.start, hop.span.end, hop.dtype, hop.quantization) for hop in upstream]
    key, keys = _hash(secret, repr((model.digest, wire_dtype, hops, adapter)).encode()), []
    for block in blocks:
        key = _hash(secret, key + block)
        keys.append(key)
    return tuple(keys)


def _hash(secret: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16, key=secret).digest()
