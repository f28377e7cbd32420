"""Hours of the day for tests that run at any."""

from __future__ import annotations

import time

from peers.serving.comfort import Schedule


def hours_without_now() -> Schedule:
    """One hour, which begins in more than an hour."""
    hour = time.localtime().tm_hour
    return Schedule(((60 * ((hour + 2) % 24), 60 * ((hour + 3) % 24)),))
