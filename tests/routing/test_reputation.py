from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.reputation import ANSWERING_BACKOFF_S_MAX, BACKOFF_S_MAX, BACKOFF_S_MIN, BUSY_S_MAX, Reputation
from tests.routing.swarms import NOW_S, peer

BAD = peer(1)


def backoff_s(reputation: Reputation, now_s: float) -> float:
    """Whole seconds until the peer may be used again, found by asking."""
    return next(s for s in range(1000) if BAD not in reputation.backed_off(now_s + s))


def test_each_failure_doubles_the_pause_up_to_a_bound() -> None:
    reputation = Reputation()
    pauses, now_s = [], NOW_S
    for _ in range(16):
        reputation.on_failure(BAD, now_s, "connection refused")
        pauses.append(backoff_s(reputation, now_s))
        now_s += pauses[-1]
    assert pauses[0] == BACKOFF_S_MIN
    assert pauses[:7] == sorted(pauses[:7])
    assert pauses[3] > 6 * BACKOFF_S_MIN
    assert BACKOFF_S_MAX / 4 < max(pauses) <= BACKOFF_S_MAX


def test_what_fails_while_a_peer_is_left_alone_is_the_same_failure() -> None:
    reputation = Reputation()
    for _ in range(50):
        reputation.on_failure(BAD, NOW_S, "its fifty sessions broke at once")
    assert backoff_s(reputation, NOW_S) == BACKOFF_S_MIN


def test_the_reason_and_the_time_left_are_told() -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "connection refused")
    assert reputation.backed_off(NOW_S + 1) == {BAD: "backed off for 1 s after: connection refused"}


def test_a_reason_that_quotes_a_stranger_is_bounded_and_printable() -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "it said \x1b[2J\n" + "x" * 1000)
    (told,) = reputation.backed_off(NOW_S).values()
    assert told.isprintable()
    assert len(told) < 250


def test_failures_fade_with_time() -> None:
    reputation = Reputation()
    for minute in range(5):
        reputation.on_failure(BAD, NOW_S + 60 * minute, "died")
    later_s = NOW_S + 86_400
    reputation.on_failure(BAD, later_s, "died")
    assert backoff_s(reputation, later_s) <= BACKOFF_S_MIN + 1


@given(st.lists(st.tuples(st.sampled_from(["failure", "busy", "success"]), st.floats(0, 1e5)), max_size=50))
def test_no_history_bans_a_peer_for_ever(events: list[tuple[str, float]]) -> None:
    reputation = Reputation()
    now_s = NOW_S
    for event, wait_s in events:
        now_s += wait_s
        if event == "failure":
            reputation.on_failure(BAD, now_s, "died")
        elif event == "busy":
            reputation.on_busy(BAD, wait_s, now_s)
        else:
            reputation.on_success(BAD, now_s)
            assert BAD not in reputation.backed_off(now_s) | dict.fromkeys(reputation.busy(now_s), "")
    assert BAD not in reputation.backed_off(now_s + BACKOFF_S_MAX)
    assert BAD not in reputation.busy(now_s + BUSY_S_MAX)


def test_success_ends_the_pause_and_forgives_half() -> None:
    reputation = Reputation()
    for minute in range(3):
        reputation.on_failure(BAD, NOW_S + 60 * minute, "died")
    now_s = NOW_S + 121
    assert reputation.backed_off(now_s)
    reputation.on_success(BAD, now_s)
    assert not reputation.backed_off(now_s)
    reputation.on_failure(BAD, now_s, "died")
    assert backoff_s(reputation, now_s) < 4 * BACKOFF_S_MIN


def test_a_peer_that_answers_again_is_used_soon_and_at_once_where_nobody_else_is() -> None:
    reputation = Reputation()
    for second in range(0, 280, 40):
        reputation.on_failure(BAD, NOW_S + second, "silent", unreachable=True, late=True)
    now_s = NOW_S + 240
    assert backoff_s(reputation, now_s) > ANSWERING_BACKOFF_S_MAX
    assert reputation.silent(now_s) == {BAD}
    reputation.on_answer(BAD, now_s + 1)
    assert backoff_s(reputation, now_s) == ANSWERING_BACKOFF_S_MAX
    reputation.on_answer(BAD, now_s + 1, needed=True)
    assert not reputation.backed_off(now_s + 1)
    assert not reputation.silent(now_s + 1)
    (told,) = reputation.opinions(now_s + 1, 1)
    assert told.strikes > 1, "its failures still count"


def test_who_may_only_be_late_is_told_from_who_is_gone() -> None:
    reputation = Reputation()
    reputation.on_failure(peer(1), NOW_S, "the connection ended", unreachable=True)
    reputation.on_failure(peer(2), NOW_S, "did not answer", unreachable=True, late=True)
    reputation.on_failure(peer(3), NOW_S, "sent nonsense")
    assert reputation.late(NOW_S) == {peer(2)}
    assert reputation.late(NOW_S + BACKOFF_S_MIN) == set()


def test_an_answer_excuses_nobody_who_erred() -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "sent nonsense")
    reputation.on_answer(BAD, NOW_S, needed=True)
    assert backoff_s(reputation, NOW_S) == BACKOFF_S_MIN
    assert not reputation.silent(NOW_S)


def test_busy_is_not_a_failure() -> None:
    reputation = Reputation()
    for _ in range(10):
        reputation.on_busy(BAD, 2.0, NOW_S)
    assert not reputation.backed_off(NOW_S)
    assert reputation.busy(NOW_S + 1.9) == {BAD}
    assert not reputation.busy(NOW_S + 2.0)
    reputation.on_failure(BAD, NOW_S, "died")
    assert backoff_s(reputation, NOW_S) == BACKOFF_S_MIN


def test_a_peer_cannot_ask_for_an_endless_pause() -> None:
    reputation = Reputation()
    for absurd_s in (1e300, float("inf"), float("nan")):
        reputation.on_busy(BAD, absurd_s, NOW_S)
        assert not reputation.busy(NOW_S + BUSY_S_MAX)


def test_a_busy_answer_does_not_end_a_pause_after_a_failure() -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "died")
    reputation.on_busy(BAD, 0.5, NOW_S)
    assert BAD in reputation.backed_off(NOW_S + 1)


def test_the_peer_heard_of_longest_ago_is_forgotten_first() -> None:
    reputation = Reputation(max_peers=2)
    for number in (1, 2, 3):
        reputation.on_failure(peer(number), NOW_S, "died")
    assert set(reputation.backed_off(NOW_S)) == {peer(2), peer(3)}


def test_what_stands_against_peers_is_told_the_latest_first_and_no_more_than_asked() -> None:
    reputation = Reputation()
    for number in (1, 2, 3):
        reputation.on_failure(peer(number), NOW_S + number, f"reason {number}")
    reputation.on_busy(peer(4), 5.0, NOW_S)
    opinions = reputation.opinions(NOW_S + 3, 3)
    assert [(each.peer_id, each.reason) for each in opinions] == [(peer(3), "reason 3"), (peer(2), "reason 2")]
    assert (opinions[0].strikes, opinions[0].backoff_s, opinions[0].age_s) == (1.0, BACKOFF_S_MIN, 0.0)
    assert reputation.opinions(NOW_S + 1e6, 9) == []


@pytest.mark.parametrize("heard", ["answer", "record"])
def test_who_is_gone_is_not_tried_before_something_is_heard_of_it(heard: str) -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "the connection ended", unreachable=True)
    much_later_s = NOW_S + BACKOFF_S_MAX
    reputation.on_record(BAD, NOW_S - 1)
    assert reputation.backed_off(much_later_s) == {BAD: "not heard of since: the connection ended"}
    assert reputation.silent(much_later_s) == reputation.unheard == {BAD}
    if heard == "answer":
        reputation.on_answer(BAD, NOW_S + 1)
    else:
        reputation.on_record(BAD, NOW_S + 1)
    assert not reputation.unheard
    assert BAD in reputation.backed_off(NOW_S + 1), "it is backed off from all the same"
    assert not reputation.backed_off(NOW_S + BACKOFF_S_MIN)


def test_silence_says_nothing_new_of_who_is_gone() -> None:
    reputation = Reputation()
    reputation.on_failure(BAD, NOW_S, "the connection ended", unreachable=True)
    reputation.on_failure(BAD, NOW_S + BACKOFF_S_MIN, "did not answer", unreachable=True, late=True)
    assert reputation.unheard == {BAD}
    assert not reputation.late(NOW_S + BACKOFF_S_MIN)
