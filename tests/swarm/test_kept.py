from __future__ import annotations

from routing.ids import BlockSpan
from routing.routes import Hop
from swarm.session.kept import KeptPrompts
from tests.routing.swarms import peer


def hops(*numbers: int) -> tuple[Hop, ...]:
    spans = (BlockSpan(at, at + 10) for at in range(0, 30, 10))
    return tuple(Hop(peer_id=peer(n), span=span, addresses=()) for n, span in zip(numbers, spans, strict=False))


def test_a_prompt_is_found_where_its_longest_known_part_was_computed_last() -> None:
    kept = KeptPrompts()
    assert kept.find([b"a"]) == (0, ())
    kept.add([b"a", b"b"], hops(0, 1))
    kept.add([b"a", b"x"], hops(2, 3))
    assert kept.find([b"a", b"b", b"c"]) == (2, hops(0, 1))
    assert kept.find([b"a", b"z"]) == (1, hops(0, 1)), "whoever was asked for it last has it for longest"
    assert kept.find([b"q", b"z"]) == (0, ())


def test_what_nobody_asked_for_lately_is_forgotten_first() -> None:
    kept = KeptPrompts(max_keys=3)
    kept.add([b"a", b"b"], hops(0))
    kept.add([b"c"], hops(1))
    assert kept.find([b"a"]) == (1, hops(0))
    kept.add([b"d"], hops(2))
    assert kept.find([b"a", b"b"]) == (1, hops(0))
    assert kept.find([b"c"]) == (1, hops(1))
