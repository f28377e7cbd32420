"""Which blocks a joining peer should serve, and when a peer that serves should serve others.

Owns these choices. Knows no memory (the caller says how many blocks fit) and does nothing: `peers.serving.rebalance`
acts. Everybody decides alone, from what everybody announces: who moves first follows from the announcements, whoever is
about to move announces that, and of two with one intent the smaller peer id goes on.
"""

from __future__ import annotations

import hashlib
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Final

from routing.errors import CallerError
from routing.flow import by_span, capacities_of
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.path import gaps
from routing.records import CLOCK_SLACK_S, Announcement, PeerState

MOVE_GAIN: Final = 1.3
"""A move without a gap must raise what the scarcest block carries by this factor. After it, the way back cannot."""
TURN_S: Final = 60.0
"""Without a gap, one peer of each span may move within this time."""
ESCALATE_S: Final = 10.0
"""After each such time for which a gap has stayed open, one more peer may close it."""
FAIR_HOP: Final = 2.0
"""A peer takes no more blocks than make its hop so many times as slow as the usual one, unless they are missing."""
_COUNTED: Final = (PeerState.JOINING, PeerState.ONLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What a peer should serve instead of what it serves now."""

    spans: BlockSpans
    intent: BlockSpan
    """The part for whose sake it moves: what it announces."""
    heals: bool
    """Blocks are missing: there is no time to lose."""


def choose_span(
    announcements: Iterable[Announcement],
    num_blocks: int,
    max_blocks: int,
    now_s: float,
    decode_s_per_block: float | None = None,
) -> BlockSpan:
    """A span of at most `max_blocks` blocks, the least replicated there are.

    `announcements` are of one model. Spans compare by the replication of their blocks, rarest first, so a span that
    holds more of the rarest blocks wins; then one to which peers give less throughput, then the lowest start. Joining
    peers and intents count, so that two that join one after the other choose differently; paused, draining and expired
    ones do not. With `decode_s_per_block`, this peer's speed, the span is also no longer than fair (FAIR_HOP). Raises
    CallerError when not even one block fits.
    """
    if max_blocks < 1:
        raise CallerError("not even one block fits into the memory of this peer", hint="allow it more memory")
    counted = [
        a
        for a in announcements
        if now_s < a.expires_at_s + CLOCK_SLACK_S and a.state in _COUNTED and a.num_blocks == num_blocks
    ]
    replication, throughput = [0] * num_blocks, _throughput(counted, num_blocks)
    for a in counted:
        for block in chain.from_iterable(a.spans):
            replication[block] += 1
        for block in a.intent or ():
            replication[block] += not any(block in span for span in a.spans)
    length = min(max_blocks, num_blocks)
    if decode_s_per_block and counted:
        usual_s = statistics.median(
            len(a.spans.parts[0]) * (a.decode_s_per_block or decode_s_per_block) for a in counted
        )
        missing = max(map(len, gaps(chain.from_iterable(a.spans for a in counted), num_blocks)), default=0)
        length = min(length, max(1, missing, int(FAIR_HOP * usual_s / decode_s_per_block)))

    sums = list(accumulate(throughput, initial=0.0))
    window = sorted(replication[:length])
    best, best_start = (tuple(window), round(sums[length], 3)), 0
    for start in range(1, num_blocks - length + 1):
        del window[bisect_left(window, replication[start - 1])]
        insort(window, replication[start + length - 1])
        found = (tuple(window), round(sums[start + length] - sums[start], 3))
        if found < best:
            best, best_start = found, start
    return BlockSpan(best_start, best_start + length)


def before_me(announcements: Iterable[Announcement], me: PeerId) -> list[Announcement]:
    """Those by which `me`, who joins, chooses: of the others that have not settled yet, only smaller peer ids count."""
    return [a for a in announcements if a.state is not PeerState.JOINING or a.intent is None or a.peer_id < me]


def choose_move(
    announcements: Sequence[Announcement], me: PeerId, now_s: float, *, open_for_s: float = 0.0
) -> Move | None:
    """What this peer should serve instead, or None while it should stay; `announcements` are of its model, its own too.

    A peer moves away only from blocks that another ONLINE peer holds and means to hold, and only if it announces that
    it may be moved (`max_blocks`). Where blocks are missing (for `open_for_s` now), one peer is called after the other:
    first those that can leave what they serve, then those that have room for the missing blocks beside it. Where none
    are, in turns, a peer whose move makes the scarcest block carry MOVE_GAIN times as much, and makes none rarer than
    the rarest was.
    """
    mine = next((a for a in announcements if a.peer_id == me), None)
    if mine is None or mine.state is not PeerState.ONLINE or not mine.max_blocks:
        return None
    num_blocks = mine.num_blocks
    alike = [a for a in announcements if a.num_blocks == num_blocks]
    online = [a for a in alike if a.state is PeerState.ONLINE]
    firm = [0] * num_blocks
    for a in online:
        if a.intent is None:
            for block in chain.from_iterable(a.spans):
                firm[block] += 1
    coming = [span for a in alike if a.state is PeerState.JOINING for span in a.spans]
    coming += [a.intent for a in alike if a.intent is not None and a.peer_id != me]
    missing = gaps([*coming, *chain.from_iterable(a.spans for a in online)], num_blocks)
    if missing:
        gap = max(missing, key=len)
        called = int(open_for_s / ESCALATE_S) + 1
        able = sorted((_rank(a, gap, firm), a.peer_id) for a in online if a.intent is None and _can_heal(a, firm))
        if me not in [peer for _, peer in able[:called]]:
            return None
        if _can_leave(mine, firm):
            others = [a for a in alike if a.peer_id != me]
            span = choose_span(others, num_blocks, mine.max_blocks, now_s)
            return Move(spans=BlockSpans.of(span), intent=span, heals=True)
        room = mine.max_blocks - mine.spans.num_blocks
        added = BlockSpan(gap.start, min(gap.end, gap.start + room))
        return Move(spans=BlockSpans.of(*mine.spans, added), intent=added, heals=True)
    return _better_balance(alike, mine, firm, now_s)


def has_turn(announcements: Iterable[Announcement], mine: Announcement, now_s: float) -> bool:
    """Whether it is this peer that may move now without a gap, of those that serve the same blocks."""
    turn = int(now_s / TURN_S)
    of_span = [a.peer_id for a in announcements if a.spans == mine.spans and a.max_blocks]
    return mine.peer_id == min(of_span, key=lambda peer: hashlib.sha256(f"{turn}/{peer}".encode()).digest())


def gives_way(announcements: Iterable[Announcement], me: PeerId, intent: BlockSpan) -> bool:
    """Whether another peer's intent goes before this one's: they overlap, and its peer id is smaller."""
    return any(
        a.intent is not None and a.peer_id < me and a.intent.start < intent.end and intent.start < a.intent.end
        for a in announcements
    )


def _can_leave(a: Announcement, firm: Sequence[int]) -> bool:
    return a.max_blocks > 0 and all(firm[block] >= 2 for block in chain.from_iterable(a.spans))


def _can_heal(a: Announcement, firm: Sequence[int]) -> bool:
    return _can_leave(a, firm) or (a.max_blocks > a.spans.num_blocks and len(a.spans.parts) == 1)


def _rank(a: Announcement, gap: BlockSpan, firm: Sequence[int]) -> tuple[bool, bytes]:
    return not _can_leave(a, firm), hashlib.sha256(f"{gap}/{a.peer_id}".encode()).digest()


def _better_balance(
    alike: Sequence[Announcement], mine: Announcement, firm: Sequence[int], now_s: float
) -> Move | None:
    if (
        mine.intent is not None
        or not _can_leave(mine, firm)
        or any(a.intent is not None and a is not mine for a in alike)
    ):
        return None
    if not has_turn((a for a in alike if a.state is PeerState.ONLINE), mine, now_s):
        return None
    others = [a for a in alike if a is not mine]
    without = _throughput((a for a in others if a.state in _COUNTED), mine.num_blocks)
    capacity = sum(amount for _, amount in capacities_of(mine))

    def scarcest(held: BlockSpans) -> float:
        each, blocks = capacity / held.num_blocks, set(chain.from_iterable(held))
        return min(amount + (each if block in blocks else 0.0) for block, amount in enumerate(without))

    now = scarcest(mine.spans)
    if min(without) + capacity < MOVE_GAIN * now:
        return None  # wherever it went
    span = choose_span(others, mine.num_blocks, mine.max_blocks, now_s, mine.decode_s_per_block)
    spans = BlockSpans.of(span)
    then = scarcest(spans)
    rarest_then = min(
        count - any(block in part for part in mine.spans) + (block in span) for block, count in enumerate(firm)
    )
    if spans == mine.spans or then < MOVE_GAIN * now or rarest_then < min(firm):
        return None
    return Move(spans=spans, intent=span, heals=False)


def _throughput(announcements: Iterable[Announcement], num_blocks: int) -> list[float]:
    """What each block gets from peers that are or will be online, if everybody shares itself out evenly."""
    amounts = [0.0] * num_blocks
    for span, amount in by_span(part for a in announcements for part in capacities_of(a)).items():
        for block in span:
            amounts[block] += amount / len(span)
    return amounts
