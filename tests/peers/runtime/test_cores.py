"""Torch's helper threads are used where they pay, and their use is reconsidered."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.cores import AGAIN, FIRST, PAYS, Cores

TOKENS = 128


def forwards(cores: Cores, count: int, *, alone_s: float, shared_s: float, tokens: int = TOKENS) -> list[bool]:
    """So many forwards that take so long, and which of them ran alone."""
    ways = []
    for _ in range(count):
        alone = cores.alone(tokens)
        cores.measured(tokens, alone=alone, seconds=tokens * (alone_s if alone else shared_s))
        ways.append(alone)
    return ways


@given(alone_s=st.floats(1e-5, 1e-2), ratio=st.floats(0.1, 3.0))
def test_helpers_are_used_where_they_save_a_tenth_and_the_other_way_is_tried_now_and_then(
    alone_s: float, ratio: float
) -> None:
    cores = Cores()
    assert tuple(forwards(cores, len(FIRST), alone_s=alone_s, shared_s=alone_s * ratio)) == FIRST
    ways = forwards(cores, 4 * AGAIN, alone_s=alone_s, shared_s=alone_s * ratio)
    usual = alone_s * ratio >= PAYS * alone_s
    assert ways.count(not usual) == 4


def test_both_ways_are_tried_alike_also_where_each_piece_of_a_prompt_takes_longer() -> None:
    assert sum(FIRST) * 2 == len(FIRST)
    assert sum(at for at, alone in enumerate(FIRST) if alone) * 2 == sum(range(len(FIRST)))


def test_sizes_are_apart_and_a_change_is_found_out() -> None:
    cores = Cores()
    forwards(cores, len(FIRST), alone_s=1.0, shared_s=0.5)
    assert not cores.alone(TOKENS)
    assert cores.alone(4 * TOKENS), "tried anew"
    # somebody else takes the other cores: what was tried so is remembered while what is used becomes slow
    forwards(cores, 2 * AGAIN, alone_s=1.0, shared_s=1.5)
    assert forwards(cores, AGAIN, alone_s=1.0, shared_s=1.5).count(False) <= 1
    # and leaves again
    forwards(cores, 4 * AGAIN, alone_s=1.0, shared_s=0.5)
    assert forwards(cores, AGAIN, alone_s=1.0, shared_s=0.5).count(True) <= 1


@given(seed=st.integers(0, 1000))
def test_one_forward_that_something_delayed_decides_nothing(seed: int) -> None:
    rng, cores = random.Random(seed), Cores()
    forwards(cores, len(FIRST), alone_s=1.0, shared_s=2.0)
    for _ in range(20):
        alone = cores.alone(TOKENS)
        late = rng.random() < 0.1
        cores.measured(TOKENS, alone=alone, seconds=TOKENS * (50.0 if late else 1.0 if alone else 2.0))
        if late:
            forwards(cores, 2, alone_s=1.0, shared_s=2.0)
    assert forwards(cores, AGAIN, alone_s=1.0, shared_s=2.0).count(False) <= 1
