"""Seconds per hop: latency + bytes / bandwidth + queue + blocks × per-block time.

The bandwidth is assumed, and the same for every peer whose owner did not cap it below that. Nothing here could measure
it honestly: a send is over when the buffers on the way have taken it, no hop says when a frame was whole, and between a
step and its answer lie the links of all hops. So bytes speak for fewer hops, and for no peer but against capped ones.

Owns the formula of a hop that is entered from this node; what a trip from another peer takes instead is the router's to
say, who knows the places of both.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from routing.estimates import PeerEstimate

BANDWIDTH_BYTES_PER_S: Final = 12.5e6
"""100 Mbit/s."""
BYTES_PER_TOKEN: Final = 16_384
"""Of hidden state, assumed where a model's own is not known: 4,096 numbers of four bytes."""


class HopCost(NamedTuple):
    """A hop of n blocks costs `enter_s + n × per_block_s`, and `leave_s` more when the route ends there.

    A tuple, because plans make thousands.
    """

    enter_s: float
    per_block_s: float
    leave_s: float


def hop_cost(estimate: PeerEstimate, *, tokens: int, bytes_per_token: int) -> HopCost:
    """What one step of `tokens` positions costs at a peer, with `bytes_per_token` of hidden state into and out of it.

    A frame takes half a round trip into the peer, and the last hop's answer takes half of one back to this node; both
    carry the whole step. What a cap adds to that falls due twice: for what comes in, and for what goes out to whomever.
    """
    step_bytes = tokens * bytes_per_token
    one_way_s = estimate.rtt_s / 2 + step_bytes / BANDWIDTH_BYTES_PER_S
    capped_s = 0.0
    if 0 < estimate.max_bytes_per_s < BANDWIDTH_BYTES_PER_S:
        capped_s = 2 * (step_bytes / estimate.max_bytes_per_s - step_bytes / BANDWIDTH_BYTES_PER_S)
    per_block_s = block_s(estimate.decode_s_per_block, estimate.prefill_s_per_token_block, tokens)
    return HopCost(one_way_s + capped_s + estimate.queue_s, per_block_s, one_way_s)


def block_s(decode_s_per_block: float, prefill_s_per_token_block: float, tokens: int) -> float:
    """One step through one block: a decode, and a prefill increment for every position after the first."""
    return decode_s_per_block + (tokens - 1) * prefill_s_per_token_block
