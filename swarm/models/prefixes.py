"""Keys and values that a caller puts before a batch's own (prefix tuning, arXiv 2101.00190), read from a cache.

Owns what of a cache can travel; what cannot raises UnsupportedCache by name. Knows neither PEFT nor how they travel.

Tensor names: B rows, J key heads, P positions of the prefix, K and V width of a key and of a value.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from peers.wire.messages import MAX_RANK, PREFIX, AdapterTarget
from swarm.errors import UnsupportedCache
from swarm.models.adapters import Attached, Part


def prefix_of(cache: Cache, num_blocks: int) -> Attached:
    """The prefix that all rows of a batch have in a cache which nothing was computed into. Raises UnsupportedCache.

    Rows that are equal are taken for one prefix, made once and repeated: its whole gradient is given to the first of
    them, and the others get none.
    """
    length = cache.get_seq_length()
    if not isinstance(cache, DynamicCache) or not length or len(cache.layers) != num_blocks:
        raise UnsupportedCache(f"a {type(cache).__name__} holds keys and values here, and the layers are remote")
    if length > MAX_RANK:
        raise UnsupportedCache(f"a prefix of {length} positions", hint=f"at most {MAX_RANK} travel")
    targets: list[AdapterTarget] = []
    weights: list[Tensor] = []
    for block, layer in enumerate(cache.layers):
        pair: tuple[Tensor | None, Tensor | None] = layer.keys, layer.values
        for part_BJPK in pair:
            if part_BJPK is None or part_BJPK.shape[2] != length:
                raise UnsupportedCache(f"not all of a prefix of {length} positions stands before block {block}")
            if (part_BJPK.detach() != part_BJPK.detach()[:1]).any():
                raise UnsupportedCache("rows of one batch with different prefixes", hint="give each a batch of its own")
            weights.append(part_BJPK[0].transpose(0, 1).flatten(1))
        keys_PK, values_PV = weights[-2:]
        targets.append(AdapterTarget(block, PREFIX, length, keys_PK.shape[1], values_PV.shape[1], 1.0))
    each = zip(targets, weights[::2], weights[1::2], strict=True)
    parts = [Part(target, keys_PK, values_PV, (0, 0), 0.0) for target, keys_PK, values_PV in each]
    return Attached(tuple(targets), tuple(weights), tuple(parts))
