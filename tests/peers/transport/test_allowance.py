"""One peer's calls are counted apart from all others'."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from peers.transport import allowance
from peers.transport.allowance import Allowance


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    calls = Allowance(burst=3, per_second=2)
    assert [calls.take("a", now_s=10.0) for _ in range(4)] == [True, True, True, False]
    assert calls.take("b", now_s=10.0)
    assert [calls.take("a", now_s=10.5) for _ in range(2)] == [True, False]


@settings(deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_no_peer_ever_gets_more_than_burst_and_rate(waits_s: list[float]) -> None:
    calls = Allowance(burst=5, per_second=3)
    now_s = allowed = 0.0
    for wait_s in waits_s:
        now_s += wait_s
        allowed += calls.take("a", now_s=now_s)
    assert allowed <= 5 + 3 * now_s + 1e-6


def test_only_so_many_peers_are_remembered() -> None:
    calls = Allowance(burst=1, per_second=0)
    for number in range(allowance._MAX_PEERS + 1):
        assert calls.take(str(number), now_s=0.0)
    assert not calls.take(str(allowance._MAX_PEERS), now_s=0.0)
    assert calls.take("0", now_s=0.0)
