"""Which blocks a joining peer should serve: the least-covered ones that fit.

Owns that choice. Knows neither memory (the caller says how many blocks fit) nor costs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import chain
from typing import Final

from routing.errors import CallerError
from routing.ids import BlockSpan
from routing.records import CLOCK_SLACK_S, Announcement, PeerState

_COUNTED: Final = (PeerState.JOINING, PeerState.ONLINE)


def choose_span(announcements: Iterable[Announcement], num_blocks: int, max_blocks: int, now_s: float) -> BlockSpan:
    """A span of `min(max_blocks, num_blocks)` blocks, the least replicated there are.

    `announcements` are of one model. Spans compare by the replication of their blocks, rarest first, so a span that
    holds more of the rarest blocks wins; the lowest start breaks ties. Peers that are joining count, so that two that
    join one after the other choose differently; paused, draining and expired ones do not. Raises CallerError when not
    even one block fits.
    """
    if max_blocks < 1:
        raise CallerError("not even one block fits into the memory of this peer", hint="allow it more memory")
    length = min(max_blocks, num_blocks)
    replication = [0] * num_blocks
    for announcement in announcements:
        live = now_s < announcement.expires_at_s + CLOCK_SLACK_S
        if live and announcement.state in _COUNTED and announcement.num_blocks == num_blocks:
            for block in chain.from_iterable(announcement.spans):
                replication[block] += 1

    window = sorted(replication[:length])
    rarest, best_start = tuple(window), 0
    for start in range(1, num_blocks - length + 1):
        del window[bisect_left(window, replication[start - 1])]
        insort(window, replication[start + length - 1])
        if tuple(window) < rarest:
            rarest, best_start = tuple(window), start
    return BlockSpan(best_start, best_start + length)
