from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.gateway.kept import MIN_SHARED, Kept, KeptLimits, Strand

LIMITS = KeptLimits(strands=3, tokens=200, age_s=60)
OLD = list(range(20))


def strand(tokens: list[int], owner: str = "a") -> Strand:
    return Strand(owner=owner, session=object(), tokens=list(tokens), regimes={"r"})


def test_what_a_prompt_goes_on_from_is_taken_out() -> None:
    kept, turn = Kept(LIMITS), strand(OLD)
    kept.put(turn, 0)
    found = kept.match("a", [*OLD, 7], "r", 1)
    assert found is not None
    assert (found.strand, found.length, found.in_place) == (turn, 20, True)
    assert kept.match("a", [*OLD, 7], "r", 1) is None


def test_what_a_prompt_only_begins_with_stays_and_is_forked() -> None:
    kept, turn = Kept(LIMITS), strand([*OLD, 1, 2, 3])
    kept.put(turn, 0)
    for _ in range(2):
        found = kept.match("a", [*OLD, 9, 9], "r", 1)
        assert found is not None
        assert (found.strand, found.length, found.in_place) == (turn, 20, False)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    kept = Kept(LIMITS)
    kept.put(strand(OLD), 0)
    found = kept.match("a", OLD, "r", 1)
    assert found is not None
    assert (found.length, found.in_place) == (19, False)


def test_nothing_passes_from_one_key_to_another_or_between_rotary_regimes() -> None:
    kept = Kept(LIMITS)
    kept.put(strand(OLD), 0)
    assert kept.match("b", [*OLD, 7], "r", 1) is None
    assert kept.match("a", [*OLD, 7], "another", 1) is None
    assert kept.match("a", [*OLD[: MIN_SHARED - 1], 99, 99], "r", 1) is None


def test_a_strand_that_a_fork_still_needs_is_not_gone_on_with() -> None:
    kept, turn = Kept(LIMITS), strand(OLD)
    kept.put(turn, 0)
    turn.pins = 1
    found = kept.match("a", [*OLD, 7], "r", 1)
    assert found is not None
    assert not found.in_place


@given(st.lists(st.tuples(st.integers(16, 120), st.floats(0, 40))))
def test_the_bounds_hold_and_nothing_is_lost(puts: list[tuple[int, float]]) -> None:
    kept, now_s, alive = Kept(LIMITS), 0.0, set[int]()
    for count, gap_s in puts:
        now_s += gap_s
        new = strand(list(range(count)))
        alive.add(id(new.session))
        for gone in kept.put(new, now_s):
            alive.remove(id(gone.session))
        assert len(kept) == len(alive) <= LIMITS.strands
        assert kept.tokens <= LIMITS.tokens
    kept.expire(now_s + LIMITS.age_s + 1)
    assert len(kept) == 0
