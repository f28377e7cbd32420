"""Seconds per hop: latency + bytes / bandwidth + queue + blocks × per-block time.

The bandwidth is that of the way from this node to the peer, where it sent something large and asked behind it when that
had been read; and assumed elsewhere (`estimates`). It stands for the way to that peer from any other one, too: what is
narrow is mostly the peer's own access link. How wide the way out of a peer is, only that peer can measure: it says so
where that is less than is assumed.

Owns the formula of a hop that is entered from this node; what a trip from another peer takes instead is the router's to
say, who knows the places of both.
"""

from __future__ import annotations

from typing import Final

import msgspec

from routing.estimates import BANDWIDTH_BYTES_PER_S, PeerEstimate

BYTES_PER_TOKEN: Final = 16_384
"""Of hidden state, assumed where a model's own is not known: 4,096 numbers of four bytes."""


class HopCost(msgspec.Struct, frozen=True, gc=False):
    """A hop of n blocks costs `enter_s + n × per_block_s`, and `leave_s` more when the route ends there.

    `leave_s` is negative where that is cheaper than to push everything on to another hop; `enter_s + leave_s` never is.
    A struct that the search for cycles passes by, because plans make thousands.
    """

    enter_s: float
    per_block_s: float
    leave_s: float


def hop_cost(
    estimate: PeerEstimate, *, tokens: float, bytes_per_token: int, back_tokens: float | None = None
) -> HopCost:
    """What one step of `tokens` positions costs at a peer, with `bytes_per_token` of hidden state into and out of it.

    A frame with the whole step takes half a round trip into the peer, and the last hop's answer takes half of one back
    to this node, with `back_tokens` positions of it (None: all). What the way out of the peer takes beyond what the
    next hop's entry assumes is part of the peer's own entry, and taken back in `leave_s`. So is a cap's; on the way in
    that adds to the entry as well.
    """
    bytes_per_s, max_bytes_per_s = estimate.bytes_per_s, estimate.max_bytes_per_s
    uplink_bytes_per_s, step_bytes = estimate.uplink_bytes_per_s, tokens * bytes_per_token
    leave_s = estimate.rtt_s / 2
    enter_s = leave_s + step_bytes / bytes_per_s + waits_s(estimate, tokens)
    out_bytes_per_s = BANDWIDTH_BYTES_PER_S
    if max_bytes_per_s or uplink_bytes_per_s:
        if 0 < max_bytes_per_s < min(bytes_per_s, BANDWIDTH_BYTES_PER_S):
            enter_s += step_bytes / max_bytes_per_s - step_bytes / BANDWIDTH_BYTES_PER_S
            out_bytes_per_s = max_bytes_per_s
        if 0 < uplink_bytes_per_s < out_bytes_per_s:
            out_bytes_per_s = uplink_bytes_per_s
        beyond_s = step_bytes / out_bytes_per_s - step_bytes / BANDWIDTH_BYTES_PER_S
        enter_s += beyond_s
        leave_s -= beyond_s
    leave_s += (step_bytes if back_tokens is None else back_tokens * bytes_per_token) / out_bytes_per_s
    per_block_s = block_s(estimate.decode_s_per_block, estimate.prefill_s_per_token_block, tokens)
    return HopCost(enter_s, per_block_s, leave_s)


def waits_s(estimate: PeerEstimate, tokens: float) -> float:
    """What a step of `tokens` positions waits at a peer where one of a single position waits `estimate.queue_s`: peers
    are shared, so what takes longer waits as many times longer."""
    if not estimate.queue_s:
        return 0.0
    return estimate.queue_s * longer(estimate.decode_s_per_block, estimate.prefill_s_per_token_block, tokens)


def longer(decode_s_per_block: float, prefill_s_per_token_block: float, tokens: float) -> float:
    """How many times as long as a step of one position a step of `tokens` takes."""
    return 1 + (tokens - 1) * prefill_s_per_token_block / decode_s_per_block if decode_s_per_block else 1.0


def block_s(decode_s_per_block: float, prefill_s_per_token_block: float, tokens: float) -> float:
    """One step through one block: a decode, and a prefill increment for every position after the first."""
    return decode_s_per_block + (tokens - 1) * prefill_s_per_token_block
