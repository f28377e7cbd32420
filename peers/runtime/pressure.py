"""Who gives way when the pages run out. Pure decisions over `pages.PagePool`.

Owns one policy and its promise. A session that cannot grow takes pages from a session younger than itself, or goes
itself; it never waits while it holds pages. Sessions are numbered by first arrival and keep their number through any
number of preemptions, so nobody can take pages from the oldest one: it runs to its end, then the next is the oldest,
and a pool that holds any single session finishes all of them.

Among the younger ones the heaviest user pays first, so that a flood of sessions costs mostly the one who sent it.
Pages that are only kept for sessions to come go before any session's.

A session that outgrew what its client said counts as younger than all that did not, from then on, however short it
begins again: these take its pages, and it takes none of theirs. So a short word opens a door sooner and buys nothing
behind it.
"""

from __future__ import annotations

from collections.abc import Callable

from peers.runtime.pages import PagePool, SlotCopy
from peers.runtime.prefixes import PrefixIndex
from routing.ids import PeerId


def grow_or_preempt(
    pool: PagePool,
    prefixes: PrefixIndex,
    session: int,
    length: int,
    owner_of: Callable[[int], PeerId],
    outgrew: Callable[[int], bool],
) -> tuple[list[SlotCopy] | None, list[int]]:
    """Grow `session` to `length`, releasing others' pages, or in the end its own, until it fits.

    `owner_of` and `outgrew`, with that length for `session`, know every session of the pool. Returns the copies to
    make, or None when `session` itself had to give way, and the sessions whose pages were released, in that order.
    """
    victims: list[int] = []
    while (copies := pool.grow(session, length)) is None:
        if prefixes.make_room(session, length):
            continue
        victim = choose_victim(pool, session, owner_of, outgrew)
        pool.release(victim)
        victims.append(victim)
        if victim == session:
            return None, victims
    return copies, victims


def choose_victim(
    pool: PagePool, session: int, owner_of: Callable[[int], PeerId], outgrew: Callable[[int], bool]
) -> int:
    """The youngest session of the owner with the most pages among those younger than `session`, first of those that
    outgrew what was said of them; else `session`."""
    younger: dict[bool, dict[PeerId, int]] = {}
    for beyond, candidate in sorted((outgrew(candidate), candidate) for candidate in pool.sessions):
        if (beyond, candidate) > (outgrew(session), session) and pool.length(candidate):
            younger.setdefault(beyond, {})[owner_of(candidate)] = candidate
    if not younger:
        return session
    held: dict[PeerId, list[int]] = {}
    for candidate in pool.sessions:
        held.setdefault(owner_of(candidate), []).append(candidate)
    youngest = younger[max(younger)]
    return youngest[max(youngest, key=lambda owner: (pool.distinct_pages(held[owner]), youngest[owner]))]
