"""A key says everything that decides a hop's positions, and nothing that does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from peers.wire.messages import MAX_PREFIX_KEYS, PREFIX_POSITIONS
from routing.ids import BlockSpan, ModelId, PeerId
from routing.routes import Hop
from swarm.session.history import Segment
from swarm.session.prefix import describe_blocks, prefix_keys
from tests.swarm.test_history import regime_key, segment

BLOCK = PREFIX_POSITIONS
SECRET = b"s" * 32
MODEL = ModelId(b"m" * 32)
IDS = list(range(100, 100 + 3 * BLOCK))


def hop(name: str, start: int, end: int, dtype: str = "float32", quantization: str = "none") -> Hop:
    span = BlockSpan(start, end)
    return Hop(peer_id=PeerId(name), span=span, addresses=(), dtype=dtype, quantization=quantization)


def keys(segments: Sequence[Segment] | None = None, **changes: Any) -> tuple[bytes, ...]:
    blocks = describe_blocks([segment(0, IDS)] if segments is None else segments, regime_key)
    given = {"secret": SECRET, "model": MODEL, "wire_dtype": "float32", "upstream": (), "blocks": blocks}
    return prefix_keys(**{**given, **changes})


def test_a_prefix_has_a_key_for_every_whole_block_and_no_two_are_equal() -> None:
    assert len(set(keys())) == 3
    assert keys([segment(0, IDS[:-1])]) == keys()[:2]
    assert keys([segment(0, IDS[: BLOCK - 1])]) == ()


@given(st.lists(st.integers(1, 3 * BLOCK), max_size=9))
def test_it_does_not_matter_in_which_pieces_the_positions_came(cuts: list[int]) -> None:
    bounds = sorted({0, *cuts, 3 * BLOCK})
    assert keys([segment(first, IDS[first:end]) for first, end in itertools.pairwise(bounds)]) == keys()


def test_a_key_changes_with_everything_before_the_end_of_its_block_and_with_nothing_behind() -> None:
    for position in range(0, 3 * BLOCK, 17):
        ids = list(IDS)
        ids[position] += 1
        changed, block = keys([segment(0, ids)]), position // BLOCK
        assert changed[:block] == keys()[:block]
        assert not set(changed[block:]) & set(keys())


def test_whatever_else_decides_what_a_hop_holds_changes_every_key() -> None:
    first, second = hop("P", 0, 2), hop("Q", 2, 4)
    routes = [
        (),
        (first,),
        (second,),
        (first, second),
        (hop("P", 0, 1),),
        (hop("R", 0, 2),),
        (hop("P", 0, 2, dtype="bfloat16"),),
        (hop("P", 0, 2, quantization="int8"),),
    ]
    every = [
        *(keys(upstream=upstream) for upstream in routes),
        keys(secret=b"t" * 32),
        keys(model=ModelId(b"n" * 32)),
        keys(wire_dtype="bfloat16"),
        keys([segment(0, IDS, offset=1)]),
        keys([segment(0, IDS, regime_length=99)]),
    ]
    assert len({key for each in every for key in each}) == 3 * len(every)


def test_a_regime_that_changes_within_a_block_changes_its_key() -> None:
    mixed = keys([segment(0, IDS[: BLOCK + 9]), segment(BLOCK + 9, IDS[BLOCK + 9 :], regime_length=99)])
    assert mixed[0] == keys()[0]
    assert mixed[1:] != keys()[1:]


def test_positions_without_token_ids_have_no_keys_nor_has_what_follows() -> None:
    embedded = segment(BLOCK, [0] * BLOCK, by_ids=False)
    assert keys([segment(0, IDS[:BLOCK]), embedded, segment(2 * BLOCK, IDS)]) == keys()[:1]


def test_there_are_at_most_as_many_keys_as_a_message_may_carry() -> None:
    long = [1] * (BLOCK * (MAX_PREFIX_KEYS + 2))
    assert len(keys([segment(0, long[:BLOCK]), segment(BLOCK, long)])) == MAX_PREFIX_KEYS
