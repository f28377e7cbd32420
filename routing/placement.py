"""Which blocks a joining peer should serve, and when a peer that serves should serve others.

Owns these choices. Knows no memory (the caller says how many blocks fit) and does nothing: `peers.serving.rebalance`
acts. Everybody decides alone, from what everybody announces: who moves first follows from the announcements, whoever is
about to move announces that, and of two with one intent the smaller peer id goes on.
"""

from __future__ import annotations

import hashlib
import statistics
from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, takewhile
from typing import Final

from routing.addresses import is_private, is_public
from routing.errors import CallerError
from routing.flow import by_span, capacity_of, parts_of
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.path import gaps
from routing.records import CLOCK_SLACK_S, Announcement, PeerState

LOOK_S: Final = 4.0
"""Between two looks of a peer, on average; peers look at different times."""
SETTLE_S: Final = 3.0
"""Long enough for intents announced at the same time to be read."""
REST_S: Final = 600.0
"""Between moves that heal nothing: each costs sessions their cache, and this peer a load."""
ARRIVE_S: Final = 60.0
"""So long who is on the way to blocks counts as if it were there; then others may go there too."""
GAP_S: Final = 20.0
"""The same where the blocks are missing, so that another one has time to fetch and load them within a minute."""
MOVE_GAIN: Final = 1.3
"""A move without a gap must raise what the scarcest block carries by this factor. After it, the way back cannot."""
TURN_S: Final = 60.0
"""Without a gap, one peer of each span may move within this time."""
ESCALATE_S: Final = 10.0
"""After each such time for which a gap has stayed open, one more peer may close it."""
FAIR_HOP: Final = 2.0
"""A peer takes no more blocks than make its hop so many times as slow as the usual one, unless they are missing."""
SHORTENED: Final = 0.8
"""Of the blocks that a peer chose before it knew its speed; where more than that is fair, it keeps them all."""
ASKED_PER_BLOCK: Final = 2
"""Holders of each block that a peer is about to leave; one that answers will do."""
MAX_PARTS: Final = 2
"""Spans of a peer that heals: each has an engine with memory of its own, and is one more hop."""
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
    peers and intents count, so that two that join one after the other choose differently; those that are paused,
    draining, expired or without an address do not. With `decode_s_per_block`, this peer's speed, the span is also no
    longer than fair (FAIR_HOP). Raises CallerError when not even one block fits.
    """
    if max_blocks < 1:
        raise CallerError("not even one block fits into the memory of this peer", hint="allow it more memory")
    counted = _counted(announcements, num_blocks, now_s)
    length = min(max_blocks, num_blocks)
    if decode_s_per_block and counted:
        missing = max(map(len, gaps(chain.from_iterable(a.spans for a in counted), num_blocks)), default=0)
        length = min(length, max(1, missing, _fair_length(counted, decode_s_per_block)))
    return _least_covered(counted, BlockSpan(0, num_blocks), num_blocks, length)


def shorten(
    announcements: Iterable[Announcement], mine: Announcement, now_s: float, decode_s_per_block: float
) -> BlockSpan:
    """What to serve of the one span that `mine` says, which was chosen before this peer knew its speed.

    It is as `choose_span` would have chosen within these blocks, and all of them where that is nearly as long
    (SHORTENED). Blocks that nobody else holds stay, and so does whatever lies between two of them. Of others that are
    joining, which may do the same now, only those with smaller peer ids that have settled hold anything; and nobody
    holds yet what it only intends to.
    """
    (span,) = mine.spans.parts
    sure = (
        replace(a, intent=None)
        for a in announcements
        if a.state is not PeerState.JOINING or (a.intent is None and a.peer_id < mine.peer_id)
    )
    counted = _counted(sure, mine.num_blocks, now_s)
    if not counted:
        return span
    held = set(chain.from_iterable(chain.from_iterable(a.spans for a in counted)))
    needed = [block for block in span if block not in held]
    length = max(1, _fair_length(counted, decode_s_per_block), needed[-1] + 1 - needed[0] if needed else 0)
    if length > SHORTENED * len(span):
        return span
    return _least_covered(counted, span, mine.num_blocks, length)


def _counted(announcements: Iterable[Announcement], num_blocks: int, now_s: float) -> list[Announcement]:
    return [
        a
        for a in announcements
        if now_s < a.expires_at_s + CLOCK_SLACK_S and a.state in _COUNTED and a.num_blocks == num_blocks and a.addresses
    ]


def _fair_length(counted: Sequence[Announcement], decode_s_per_block: float) -> int:
    return int(FAIR_HOP * _usual_hop_s(counted, decode_s_per_block) / decode_s_per_block)


def _least_covered(counted: Sequence[Announcement], within: BlockSpan, num_blocks: int, length: int) -> BlockSpan:
    replication, throughput = [0] * num_blocks, _throughput(counted, num_blocks)
    for a in counted:
        for block in chain.from_iterable(a.spans):
            replication[block] += 1
        for block in a.intent or ():
            replication[block] += not any(block in span for span in a.spans)
    sums = list(accumulate(throughput, initial=0.0))
    first = within.start
    window = sorted(replication[first : first + length])
    best, best_start = (tuple(window), round(sums[first + length] - sums[first], 3)), first
    for start in range(first + 1, within.end - length + 1):
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
    announcements: Sequence[Announcement],
    me: PeerId,
    now_s: float,
    *,
    open_for_s: float = 0.0,
    late: Container[PeerId] = (),
    max_parts: int = MAX_PARTS,
) -> Move | None:
    """What this peer should serve instead, or None while it should stay; `announcements` are of its model, its own too.

    A peer moves away only from blocks that another ONLINE peer holds and means to hold, and only if it announces that
    it may be moved (`max_blocks`). Where blocks are missing (for `open_for_s` now), one peer is called after the other.
    It adds them to its own and gives up no more than it has no room for: first those whose blocks all have another
    holder meanwhile, of these those that close most, stay fair (FAIR_HOP) and give up nothing. Where none are missing,
    in turns, a peer whose move makes the scarcest block carry MOVE_GAIN times as much, and makes none rarer than the
    rarest was. Who is on the way counts, but for the `late` (`Arrivals`). `max_parts` spans fit here.
    """
    mine = next((a for a in announcements if a.peer_id == me), None)
    if mine is None or mine.state is not PeerState.ONLINE or not mine.max_blocks or not mine.addresses:
        return None
    num_blocks = mine.num_blocks
    alike = usable(announcements, mine)
    online = [a for a in alike if a.state is PeerState.ONLINE]
    firm = [0] * num_blocks
    for a in online:
        if a.intent is None:
            for block in chain.from_iterable(a.spans):
                firm[block] += 1
    under_way = [a for a in alike if a.peer_id != me and a.peer_id not in late]
    coming = [span for a in under_way if a.state is PeerState.JOINING for span in a.spans]
    coming += [a.intent for a in under_way if a.intent is not None]
    missing = gaps([*coming, *chain.from_iterable(a.spans for a in online)], num_blocks)
    if not missing:
        return _better_balance(alike, mine, firm, now_s, late)
    gap = max(missing, key=len)
    usual_s = _usual_hop_s(online, mine.decode_s_per_block)
    able = sorted((_rank(a, gap, firm, usual_s, n), a.peer_id) for a in online if (n := _closes(a, gap, firm)) > 0)
    if me not in [peer for _, peer in able[: int(open_for_s / ESCALATE_S) + 1]]:
        return None
    return _heal(mine, gap, firm, max_parts)


def stands(
    move: Move,
    announcements: Sequence[Announcement],
    me: PeerId,
    *,
    late: Container[PeerId] = (),
    ready: bool = False,
    answered: Container[PeerId] | None = None,
) -> bool:
    """Whether a move that this peer announced SETTLE_S ago or earlier is still right.

    Every block that it leaves has another holder, who stays: of two that would leave the same, the smaller id goes.
    Before it leaves, only those count that `answered` when they were asked (`to_ask`). What it heals is still missing,
    and nobody with an overlapping intent goes before it; unless it is `ready`, with all that it needs on its disk: then
    others with intents have farther to go.
    """
    mine = next((a for a in announcements if a.peer_id == me), None)
    if mine is None or mine.state is not PeerState.ONLINE or not mine.addresses:
        return False
    others = [a for a in usable(announcements, mine) if a.peer_id != me]
    if not ready and gives_way((a for a in others if a.peer_id not in late), me, move.intent):
        return False
    online = [a for a in others if a.state is PeerState.ONLINE]
    stay = blocks_of(
        span for a in _staying(others, me) if answered is None or a.peer_id in answered for span in a.spans
    )
    if not blocks_of(mine.spans) - blocks_of(move.spans) <= stay:
        return False
    joining = [a for a in others if a.state is PeerState.JOINING and a.peer_id not in late]
    return not move.heals or not any(a.spans.overlaps(move.intent) for a in (*online, *joining))


def to_ask(move: Move, announcements: Sequence[Announcement], me: PeerId) -> list[Announcement]:
    """Whom a peer asks whether they are there before it leaves blocks to them, as a record outlives who dies.

    Of each such block ASKED_PER_BLOCK holders who stay, as far as there are so many: first those that hold most of
    what it leaves, of these those whose records are the latest.
    """
    mine = next(a for a in announcements if a.peer_id == me)
    lacking = dict.fromkeys(blocks_of(mine.spans) - blocks_of(move.spans), ASKED_PER_BLOCK)
    held = [(a, blocks_of(a.spans) & lacking.keys()) for a in _staying(usable(announcements, mine), me)]
    asked = []
    for a, blocks in sorted(held, key=lambda pair: (len(pair[1]), pair[0].expires_at_s), reverse=True):
        if any(lacking[block] > 0 for block in blocks):
            asked.append(a)
            for block in blocks:
                lacking[block] -= 1
    return asked


def usable(announcements: Iterable[Announcement], mine: Announcement) -> list[Announcement]:
    """Those, this peer's own too, that serve clients who use this peer: others are no holders to them.

    Who is on the internet does not count those who are not: they are in somebody's own network.
    """
    public = any(map(is_public, mine.addresses))
    return [
        a
        for a in announcements
        if a.num_blocks == mine.num_blocks
        and a.protocol == mine.protocol
        and any(not (public and is_private(address)) for address in a.addresses)
    ]


class Arrivals:
    """Since when each block is missing, and each peer on its way to other blocks, as far as this one saw it."""

    def __init__(self) -> None:
        self._missing_since_s: dict[int, float] = {}
        self._since_s: dict[PeerId, tuple[tuple[object, ...], float]] = {}
        self._toward_s: dict[PeerId, float] = {}
        """The same to missing ones, by whatever stretches."""
        self._served: set[PeerId] = set()
        """Seen online: if they join again, they move, with all that they need on their disks."""

    def late(self, announcements: Sequence[Announcement], now_s: float) -> frozenset[PeerId]:
        """Of those announced now, who counts no more: after ARRIVE_S on one and the same stretch of its way.

        On the way to a missing block after GAP_S or, so that few fetch at once what takes long to fetch, half of the
        time for which it is missing; by whatever stretches, after ARRIVE_S or as long. Who joins, once a block to which
        it goes is missing for GAP_S.
        """
        online = [a for a in announcements if a.state is PeerState.ONLINE]
        self._served = {a.peer_id for a in announcements if a.peer_id in self._served} | {a.peer_id for a in online}
        spans = set(chain.from_iterable(a.spans for a in online))
        missing = blocks_of(gaps(spans, announcements[0].num_blocks)) if announcements else set()
        self._missing_since_s = {block: self._missing_since_s.get(block, now_s) for block in missing}
        overdue = {block for block, at_s in self._missing_since_s.items() if now_s - at_s >= GAP_S}
        since_s, toward_s, late = {}, {}, set()
        for a in announcements:
            if a.state is not PeerState.JOINING and a.intent is None:
                continue
            stretch = (a.state, a.spans, a.intent)
            known = self._since_s.get(a.peer_id)
            since_s[a.peer_id] = known if known is not None and known[0] == stretch else (stretch, now_s)
            goes_to = blocks_of(a.spans if a.intent is None else [a.intent])
            patience_s = ARRIVE_S
            if closes := goes_to & missing:
                half_s = max(now_s - self._missing_since_s[block] for block in closes) / 2
                patience_s = max(GAP_S, half_s)
                toward_s[a.peer_id] = self._toward_s.get(a.peer_id, now_s)
                joins = a.peer_id not in self._served and not goes_to.isdisjoint(overdue)
                if joins or now_s - toward_s[a.peer_id] >= max(ARRIVE_S, half_s):
                    late.add(a.peer_id)
            if now_s - since_s[a.peer_id][1] >= patience_s:
                late.add(a.peer_id)
        self._since_s, self._toward_s = since_s, toward_s
        return frozenset(late)

    def open_for_s(self, now_s: float) -> float:
        """For how long the block is missing that is missing for longest, by the last look at who is late; else 0."""
        return now_s - min(self._missing_since_s.values(), default=now_s)


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


def _staying(announcements: Iterable[Announcement], me: PeerId) -> list[Announcement]:
    """The other holders that do not go before this one."""
    return [
        a
        for a in announcements
        if a.peer_id != me and a.state is PeerState.ONLINE and (a.intent is None or a.peer_id > me)
    ]


def _can_leave(a: Announcement, firm: Sequence[int]) -> bool:
    return a.max_blocks > 0 and all(firm[block] >= 2 for block in chain.from_iterable(a.spans))


def _closes(a: Announcement, gap: BlockSpan, firm: Sequence[int]) -> int:
    """How many blocks of the gap this peer can serve; 0 for those that are not to move."""
    if a.intent is not None or not a.max_blocks:
        return 0
    if len(a.spans.parts) > 1:
        move = _heal(a, gap, firm)
        return 0 if move is None else len(move.intent)
    return min(len(gap), a.max_blocks - a.spans.num_blocks + max(_spare(a, firm)))


def _rank(
    a: Announcement, gap: BlockSpan, firm: Sequence[int], usual_s: float, closed: int
) -> tuple[bool, int, bool, bool, bytes]:
    """Who closes a gap first: see `choose_move`."""
    room = a.max_blocks - a.spans.num_blocks
    hop_s = (a.spans.num_blocks + min(closed, room)) * a.decode_s_per_block
    shuffled = hashlib.sha256(f"{gap}/{a.peer_id}".encode()).digest()
    return not _can_leave(a, firm), -closed, hop_s > FAIR_HOP * usual_s, closed > room, shuffled


def _heal(mine: Announcement, gap: BlockSpan, firm: Sequence[int], max_parts: int = MAX_PARTS) -> Move | None:
    """As much of the gap as this peer can serve, beside its own blocks; where it lacks room, instead of some at one end
    of them, of those that others hold too. Only the gap is downloaded."""
    own = [*chain.from_iterable(mine.spans)]
    room = mine.max_blocks - len(own)
    leading, trailing = _spare(mine, firm)
    most = max(leading, trailing)
    for size in range(min(len(gap), room + most), 0, -1):
        for left in range(max(0, size - room), most + 1):
            kept = [own[left:]] * (left <= leading) + [own[: len(own) - left]] * (left <= trailing)
            ways = [
                (BlockSpans.of(*_runs(blocks), added), added)
                for blocks in kept
                for added in (BlockSpan(gap.start, gap.start + size), BlockSpan(gap.end - size, gap.end))
            ]
            spans, added = min(ways, key=lambda way: (len(way[0].parts), way))
            if len(spans.parts) <= max_parts:
                return Move(spans=spans, intent=added, heals=True)
    return None


def _spare(a: Announcement, firm: Sequence[int]) -> tuple[int, int]:
    """How many blocks at the beginning, and at the end, of what a peer serves another one holds, and means to hold."""
    own = [*chain.from_iterable(a.spans)]
    leading, trailing = (sum(1 for _ in takewhile(lambda b: firm[b] >= 2, blocks)) for blocks in (own, own[::-1]))
    return leading, trailing


def _runs(blocks: Iterable[int]) -> list[BlockSpan]:
    runs: list[BlockSpan] = []
    for block in blocks:
        if runs and runs[-1].end == block:
            runs[-1] = BlockSpan(runs[-1].start, block + 1)
        else:
            runs.append(BlockSpan(block, block + 1))
    return runs


def blocks_of(spans: Iterable[BlockSpan]) -> set[int]:
    return set(chain.from_iterable(spans))


def _usual_hop_s(counted: Iterable[Announcement], unknown_s: float) -> float:
    """A step of one position through what a peer serves; `unknown_s` per block for those that do not say."""
    return statistics.median(len(a.spans.parts[0]) * (a.decode_s_per_block or unknown_s) for a in counted)


def _better_balance(
    alike: Sequence[Announcement], mine: Announcement, firm: Sequence[int], now_s: float, late: Container[PeerId]
) -> Move | None:
    if (
        mine.intent is not None
        or not _can_leave(mine, firm)
        or any(a.intent is not None and a is not mine and a.peer_id not in late for a in alike)
    ):
        return None
    if not has_turn((a for a in alike if a.state is PeerState.ONLINE), mine, now_s):
        return None
    others = [a for a in alike if a is not mine]
    without = _throughput([a for a in others if a.state in _COUNTED], mine.num_blocks)
    capacity = capacity_of(mine)

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


def _throughput(announcements: Sequence[Announcement], num_blocks: int) -> list[float]:
    """What each block gets from peers that are or will be online, if everybody shares itself out evenly.

    Who does not say how fast it is counts as the usual one.
    """
    said = [capacity_of(a) if a.decode_s_per_block else None for a in announcements]
    usual = statistics.median([amount for amount in said if amount is not None] or [0.0]) if None in said else 0.0
    shared = (parts_of(a.spans, usual if c is None else c) for a, c in zip(announcements, said, strict=True))
    amounts = [0.0] * num_blocks
    for span, amount in by_span(chain.from_iterable(shared)).items():
        for block in span:
            amounts[block] += amount / len(span)
    return amounts
