"""The policy for a full cache, and its promise, under random interleavings."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from peers.runtime.pages import PagePool
from peers.runtime.prefixes import PrefixIndex
from peers.runtime.pressure import choose_victim, grow_or_preempt
from routing.ids import PeerId

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")


def pool_with(lengths: dict[int, int], num_pages: int) -> PagePool:
    pool = PagePool(num_pages, 1)
    for session, length in lengths.items():
        pool.open(session)
        assert pool.grow(session, length) == []
    return pool


def nobody(_: int) -> bool:
    """Outgrew what was said of it."""
    return False


def test_the_youngest_session_of_the_heaviest_user_goes_first() -> None:
    pool = pool_with({0: 1, 1: 2, 2: 4, 3: 3, 4: 1}, 11)
    owners = {0: ALICE, 1: BOB, 2: CAROL, 3: BOB, 4: CAROL}
    assert (
        choose_victim(pool, 0, owners.__getitem__, nobody) == 4
    )  # carol and bob hold five pages each; carol's is younger
    assert grow_or_preempt(pool, PrefixIndex(pool), 0, 4, owners.__getitem__, nobody) == ([], [4, 3])


def test_an_older_session_never_pays() -> None:
    pool = pool_with({0: 8, 1: 1}, 9)
    owners = {0: ALICE, 1: BOB}
    assert grow_or_preempt(pool, PrefixIndex(pool), 1, 2, owners.__getitem__, nobody) == (None, [1])
    assert pool.length(0) == 8


def test_a_session_without_pages_is_no_victim() -> None:
    pool = pool_with({0: 4, 1: 0}, 4)
    owners = {0: ALICE, 1: BOB}
    assert grow_or_preempt(pool, PrefixIndex(pool), 0, 5, owners.__getitem__, nobody) == (None, [0])


def test_shared_pages_count_once() -> None:
    pool = pool_with({0: 1, 1: 4, 2: 5}, 10)
    for child in (3, 4, 5):
        pool.fork(1, child, 4)
    owners = {0: ALICE, 1: BOB, 2: CAROL, 3: BOB, 4: BOB, 5: BOB}
    assert choose_victim(pool, 0, owners.__getitem__, nobody) == 2


def test_who_outgrew_what_was_said_of_it_gives_way_before_all_others_however_old_it_is() -> None:
    pool = pool_with({0: 3, 1: 3, 2: 1, 3: 2}, 9)
    among = {0: BOB, 1: ALICE, 2: ALICE, 3: CAROL}.__getitem__, {0, 3}.__contains__
    assert choose_victim(pool, 2, *among) == 0, "bob has more pages than carol"
    assert grow_or_preempt(pool, PrefixIndex(pool), 2, 6, *among) == ([], [0, 3])
    assert choose_victim(pool, 2, *among) == 2, "alice's other one is older"


def test_who_outgrows_what_was_said_of_it_takes_from_nobody_who_does_not() -> None:
    pool = pool_with({0: 2, 1: 4, 2: 2}, 8)
    among = {0: ALICE, 1: BOB, 2: CAROL}.__getitem__, {0, 2}.__contains__
    assert grow_or_preempt(pool, PrefixIndex(pool), 0, 4, *among) == ([], [2]), "of such sessions the older one stays"
    assert grow_or_preempt(pool, PrefixIndex(pool), 0, 5, *among) == (None, [0])


@dataclass
class Client:
    """Wants `length` positions in steps of `step`; replays from the start when preempted; leaves when done."""

    number: int
    owner: PeerId
    length: int
    step: int
    word: int
    """Says so, whatever it wants."""
    held: int = 0
    done: bool = False
    outgrew: bool = False


@settings(max_examples=80, deadline=None)
@given(
    num_pages=st.integers(4, 12),
    page_size=st.integers(1, 4),
    wishes=st.lists(
        st.tuples(st.sampled_from([ALICE, BOB, CAROL]), st.integers(1, 48), st.integers(1, 9), st.integers(1, 48)),
        max_size=9,
    ),
    seed=st.integers(0, 1000),
)
def test_a_pool_too_small_for_all_sessions_at_once_finishes_every_one(
    num_pages: int, page_size: int, wishes: list[tuple[PeerId, int, int, int]], seed: int
) -> None:
    pool = PagePool(num_pages, page_size)
    prefixes = PrefixIndex(pool)
    clients = {
        number: Client(number, owner, min(length, num_pages * page_size), step, word)
        for number, (owner, length, step, word) in enumerate(wishes)
    }
    rng, turn = random.Random(seed), 0
    while unfinished := [client for client in clients.values() if not client.done]:
        turn += 1
        # every so often everybody has a turn, as any client that retries in bounded time has
        turns = unfinished if turn % 5 == 0 else [rng.choice(unfinished)]
        oldest_held = unfinished[0].held
        for client in turns:
            if client.number not in pool.sessions:
                pool.open(client.number)
            length = min(client.held + client.step, client.length)
            client.outgrew = client.outgrew or length > client.word
            copies, victims = grow_or_preempt(
                pool,
                prefixes,
                client.number,
                length,
                lambda number: clients[number].owner,
                lambda number: clients[number].outgrew,
            )
            for victim in victims:
                assert victim == client.number or clients[victim].outgrew >= client.outgrew, "nobody pays for a lie"
                clients[victim].held = 0
            if copies is not None:
                client.held = length
            if client.held == client.length:
                client.done = True
                pool.release(client.number)
            assert all(pool.length(number) == clients[number].held for number in pool.sessions)
        assert unfinished[0].held >= oldest_held or unfinished[0].outgrew  # nobody takes anything from the oldest
        assert turn < 5000
    assert pool.used_pages == 0
