"""Where nodes are, as points whose distances predict round trips: network coordinates.

Owns the arithmetic of Vivaldi with heights (Dabek, Cox, Kaashoek, Morris: "Vivaldi: A Decentralized Network Coordinate
System", SIGCOMM 2004, sections 3.5 and 5.4). Every node moves its own point a little with each round trip that it
measures, and announces it. So a client prices a trip between two peers, or to one that it never met, without asking
either. A round trip says nothing about its two halves, so both are taken to be equal; and a point is a claim.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final, NamedTuple

from routing.errors import CallerError

MAX_COORDINATE_S: Final = 10.0
"""No honest point lies further out: half of it is a trip to the moon and back."""
USABLE_ERROR: Final = 0.5
"""Points that are wrong by more than this share of a round trip predict nothing."""
CELL_S: Final = 0.02
"""Points whose distances to anywhere differ by less are about at one place."""
_GAIN: Final = 0.25
"""`c_e` and `c_c` of the paper."""
_HEIGHT_S_MIN: Final = 1e-5
_RTT_S_MIN: Final = 1e-6


class Coordinate(NamedTuple):
    """A point in the plane, a height above it (the node's own access link), and how wrong its predictions are."""

    x_s: float = 0.0
    y_s: float = 0.0
    height_s: float = _HEIGHT_S_MIN
    error: float = 1.0
    """Relative, smoothed, 0 to 1; a node that measured nothing yet is at the origin with 1."""

    @property
    def usable(self) -> bool:
        return self.error <= USABLE_ERROR


def check_coordinate(point: Coordinate) -> Coordinate:
    """The point itself, when a record can carry it. Raises CallerError."""
    x_s, y_s, height_s, error = point
    in_reach = abs(x_s) <= MAX_COORDINATE_S and abs(y_s) <= MAX_COORDINATE_S and 0 <= height_s <= MAX_COORDINATE_S
    if not (in_reach and 0 <= error <= 1):
        raise CallerError(f"{tuple(point)} is no network coordinate")
    return point


def distance_s(a: Coordinate, b: Coordinate) -> float:
    """The round trip that the points predict."""
    x_s, y_s = a[0] - b[0], a[1] - b[1]
    return math.sqrt(x_s * x_s + y_s * y_s) + a[2] + b[2]  # not hypot, which rounds otherwise in arrays (`strangers`)


def half_trip_s(from_s: float, here: Coordinate | None, to_s: float, there: Coordinate | None) -> float:
    """Half a round trip between two peers, at usable places, to which this node's own take `from_s` and `to_s`."""
    if here is None or there is None:
        return to_s / 2
    trip_s, least_s, most_s = distance_s(here, there), abs(from_s - to_s), from_s + to_s
    return (least_s if trip_s < least_s else most_s if trip_s > most_s else trip_s) / 2


def moved(mine: Coordinate, theirs: Coordinate, rtt_s: float, *, salt: str) -> Coordinate:
    """My point after one round trip to a node that says it is at `theirs`.

    `salt` decides the direction in which two nodes at one place part. Samples that are no round trip change nothing.
    """
    if not _RTT_S_MIN <= rtt_s <= MAX_COORDINATE_S:
        return mine
    predicted_s = distance_s(mine, theirs)
    weight = mine.error / max(mine.error + theirs.error, 1e-9)
    gain = _GAIN * weight
    error = min(1.0, abs(predicted_s - rtt_s) / rtt_s * gain + mine.error * (1 - gain))
    force_s = gain * (rtt_s - predicted_s)
    apart_s = math.hypot(mine.x_s - theirs.x_s, mine.y_s - theirs.y_s)
    if apart_s > 1e-9:
        direction = ((mine.x_s - theirs.x_s) / apart_s, (mine.y_s - theirs.y_s) / apart_s)
        height_s = mine.height_s + force_s * (mine.height_s + theirs.height_s) / predicted_s
    else:
        angle = 2 * math.pi * int.from_bytes(hashlib.sha256(salt.encode()).digest()[:4], "big") / 2**32
        direction, height_s = (math.cos(angle), math.sin(angle)), mine.height_s
    return Coordinate(
        _bounded(mine.x_s + force_s * direction[0], -MAX_COORDINATE_S),
        _bounded(mine.y_s + force_s * direction[1], -MAX_COORDINATE_S),
        _bounded(height_s, _HEIGHT_S_MIN),
        error,
    )


def _bounded(value: float, least: float) -> float:
    return min(max(value, least), MAX_COORDINATE_S)
