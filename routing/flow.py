"""Many users at once: how much a swarm can carry, and which share of it each peer should take.

Owns the arithmetic over blocks × peers. A peer of capacity c spends one unit for every token on every block, wherever
in its span; a swarm carries F tokens/s when every block gets F of them. Knows no latency and no session.

    blocks    0    1    2    3        every block draws F from the peers whose spans hold it,
    A (c=4)   ├────┼────┤             every peer gives at most c in all:
    B (c=6)        ├────┼────┤        a maximum flow from peers to blocks
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from routing.ids import BlockSpan, BlockSpans
from routing.records import Announcement

BATCH: Final = 8
"""Tokens per forward for which a peer's capacity is taken: many users are batched."""
GOLDEN: Final = 0.6180339887498949
"""The fractional part of the golden ratio: `(start + n · GOLDEN) mod 1` visits every share in turn, in proportion, and
interleaved, as weighted round robin does, and without a memory of whom it visited (Kronecker's sequence; the gaps have
at most three lengths, Sós 1958)."""
_BISECTIONS: Final = 40
_ROUNDS: Final = 24
_PRICE_MIN: Final = 1e-6

K = TypeVar("K")


def capacity(decode_s_per_block: float, prefill_s_per_token_block: float) -> float:
    """Blocks × tokens per second that a peer computes for BATCH users at once, as it says."""
    return BATCH / max(decode_s_per_block + (BATCH - 1) * prefill_s_per_token_block, 1e-9)


def capacity_of(announcement: Announcement) -> float:
    return capacity(announcement.decode_s_per_block, announcement.prefill_s_per_token_block)


def capacities_of(announcement: Announcement) -> list[tuple[BlockSpan, float]]:
    """Each of a peer's spans with a part of its capacity, by blocks."""
    return parts_of(announcement.spans, capacity_of(announcement))


def parts_of(spans: BlockSpans, whole: float) -> list[tuple[BlockSpan, float]]:
    """Each of these with a part of a peer's capacity, by blocks."""
    parts = spans.parts
    if len(parts) == 1:
        return [(parts[0], whole)]
    return [(span, whole * len(span) / spans.num_blocks) for span in parts]


def by_span(servers: Iterable[tuple[BlockSpan, float]]) -> dict[BlockSpan, float]:
    """The summed capacities of each span: peers with one span are one to a flow."""
    sums: defaultdict[tuple[int, int], float] = defaultdict(float)
    for span, amount in servers:
        sums[span.start, span.end] += amount  # a tuple: thousands are hashed
    return {BlockSpan(*ends): amount for ends, amount in sums.items()}


def max_flow(capacities: Mapping[BlockSpan, float], num_blocks: int) -> float:
    """The most tokens per second that these capacities carry through all blocks, by bisection.

    Whether F is carried is decided greedily: block after block draws F from the spans that end first. That is earliest
    deadline first with preemption, which fills every block if anything does (Horn 1974). Blocks between which no span
    begins or ends are one, of so many times F.
    """
    least, most = 0.0, sum(capacities.values()) / num_blocks
    ordered = sorted(capacities.items())
    edges = sorted({0, num_blocks}.union(*((span.start, span.end) for span in capacities)))
    for _ in range(_BISECTIONS):
        middle = (least + most) / 2
        if _carries(middle, ordered, edges):
            least = middle
        else:
            most = middle
    return least


def _carries(flow: float, ordered: Sequence[tuple[BlockSpan, float]], edges: Sequence[int]) -> bool:
    open_spans: list[tuple[int, float]] = []
    following = 0
    for block, until in itertools.pairwise(edges):
        while following < len(ordered) and ordered[following][0].start <= block:
            heapq.heappush(open_spans, (ordered[following][0].end, ordered[following][1]))
            following += 1
        missing = flow * (until - block)
        while missing > 0:
            while open_spans and open_spans[0][0] <= block:
                heapq.heappop(open_spans)
            if not open_spans:
                return False
            end, left = open_spans[0]
            if left > missing:
                heapq.heapreplace(open_spans, (end, left - missing))
            else:
                heapq.heappop(open_spans)
            missing -= left
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Which part of its capacity a peer should give to each block of its span."""

    up_to: tuple[float, ...]
    """Prices of all blocks in front of a boundary, summed; scarce blocks are dear."""
    tokens_per_s: float
    """What the scarcest block gets under these shares: at most `max_flow`, and close to it."""

    def of(self, span: BlockSpan, amount: float, hop: BlockSpan) -> float:
        """Tokens per second that a peer with this span and capacity should carry through the blocks of `hop`."""
        whole = self.up_to[span.end] - self.up_to[span.start]
        return amount * (self.up_to[hop.end] - self.up_to[hop.start]) / whole / len(hop)


def shares(capacities: Mapping[BlockSpan, float], num_blocks: int) -> Shares:
    """Shares under which the scarcest block gets as much as it can, and abundant ones what is left over.

    Every peer splits its capacity in proportion to the prices of its blocks, and prices rise where little arrives:
    matrix scaling (Sinkhorn 1967), which spreads the load over everybody where an extreme solution of the flow would
    leave peers idle. A block that nobody holds gets nothing, and does not disturb the rest.
    """
    prices = [1.0] * num_blocks
    best = Shares(up_to=_sums(prices), tokens_per_s=0.0)
    edges = np.array([(span.start, span.end) for span in capacities], dtype=np.int64).reshape(-1, 2)
    amounts = np.array(list(capacities.values()), dtype=np.float64)
    for _ in range(_ROUNDS):
        up_to = _sums(prices)
        rates = amounts / np.diff(np.array(up_to)[edges])[:, 0]
        # Thousands of spans may differ: what each adds where it starts, and takes off where it ends.
        change = np.bincount(edges.ravel(), np.stack((rates, -rates), axis=1).ravel(), num_blocks + 1).tolist()
        arriving = [price * rate for price, rate in zip(prices, itertools.accumulate(change[:-1]), strict=True)]
        held = [amount for amount in arriving if amount > 1e-12]
        if not held:
            break
        if min(held) > best.tokens_per_s:
            best = Shares(up_to=up_to, tokens_per_s=min(held))
        mean = sum(held) / len(held)
        prices = [
            price * mean / amount if amount > 1e-12 else 0.0 for price, amount in zip(prices, arriving, strict=True)
        ]
        scale = num_blocks / sum(prices)
        prices = [max(price * scale, _PRICE_MIN) for price in prices]
    return best


def pick(weights: Mapping[K, float], at: float) -> K:
    """The one whose part of the unit interval holds `at`, when all divide it by weight, in the mapping's order."""
    left = (at % 1.0) * sum(weights.values())
    for key, weight in weights.items():
        left -= weight
        if left < 0:
            return key
    return key


def _sums(prices: Sequence[float]) -> tuple[float, ...]:
    return tuple(itertools.accumulate(prices, initial=0.0))
