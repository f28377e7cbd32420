"""Seconds per hop: latency + bytes / bandwidth + queue + blocks × per-block time.

The bandwidth is that of the way from this node to the peer, where it sent something large and asked behind it when that
had been read; and assumed elsewhere (`estimates`). It stands for the way to that peer from any other one, too: what is
narrow is mostly the peer's own access link. Of the way back nothing is measured: a client is sent nothing large.

Owns the formula of a hop that is entered from this node; what a trip from another peer takes instead is the router's to
say, who knows the places of both.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from routing.estimates import BANDWIDTH_BYTES_PER_S, PeerEstimate

BYTES_PER_TOKEN: Final = 16_384
"""Of hidden state, assumed where a model's own is not known: 4,096 numbers of four bytes."""


class HopCost(NamedTuple):
    """A hop of n blocks costs `enter_s + n × per_block_s`, and `leave_s` more when the route ends there.

    A tuple, because plans make thousands.
    """

    enter_s: float
    per_block_s: float
    leave_s: float


def hop_cost(estimate: PeerEstimate, *, tokens: float, bytes_per_token: int) -> HopCost:
    """What one step of `tokens` positions costs at a peer, with `bytes_per_token` of hidden state into and out of it.

    A frame takes half a round trip into the peer, and the last hop's answer takes half of one back to this node; both
    carry the whole step. What a cap adds to that falls due twice: for what comes in, and for what goes out to whomever.
    """
    rtt_s, _, decode_s_per_block, prefill_s_per_token_block, max_bytes_per_s, bytes_per_s = estimate
    step_bytes = tokens * bytes_per_token
    enter_s = rtt_s / 2 + step_bytes / bytes_per_s + waits_s(estimate, tokens)
    leave_s = rtt_s / 2 + step_bytes / BANDWIDTH_BYTES_PER_S
    if 0 < max_bytes_per_s < min(bytes_per_s, BANDWIDTH_BYTES_PER_S):
        enter_s += 2 * (step_bytes / max_bytes_per_s - step_bytes / BANDWIDTH_BYTES_PER_S)
    return HopCost(enter_s, block_s(decode_s_per_block, prefill_s_per_token_block, tokens), leave_s)


def waits_s(estimate: PeerEstimate, tokens: float) -> float:
    """What a step of `tokens` positions waits at a peer where one of a single position waits `estimate.queue_s`: peers
    are shared, so what takes longer waits as many times longer."""
    _, queue_s, decode_s_per_block, prefill_s_per_token_block, *_ = estimate
    return queue_s * longer(decode_s_per_block, prefill_s_per_token_block, tokens) if queue_s else 0.0


def longer(decode_s_per_block: float, prefill_s_per_token_block: float, tokens: float) -> float:
    """How many times as long as a step of one position a step of `tokens` takes."""
    return 1 + (tokens - 1) * prefill_s_per_token_block / decode_s_per_block if decode_s_per_block else 1.0


def block_s(decode_s_per_block: float, prefill_s_per_token_block: float, tokens: float) -> float:
    """One step through one block: a decode, and a prefill increment for every position after the first."""
    return decode_s_per_block + (tokens - 1) * prefill_s_per_token_block
