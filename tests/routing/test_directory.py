from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from routing.directory import Directory
from routing.records import CLOCK_SLACK_S, RECORD_LIFETIME_S, Announcement, PeerState
from tests.routing.swarms import MODEL, NOW_S, OTHER_MODEL, announcement, peer


def live(directory: Directory, now_s: float = NOW_S) -> set[Announcement]:
    return set(directory.snapshot(now_s).peers)


def test_the_highest_sequence_of_a_peer_wins_whatever_comes_last() -> None:
    directory = Directory()
    old, new = announcement(peer(1), sequence=1), announcement(peer(1), 10, 20, sequence=2)
    directory.fold([new, old], NOW_S)
    directory.fold([old], NOW_S)
    assert live(directory) == {new}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=30), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(said: list[tuple[int, int]], rng: random.Random) -> None:
    # One sequence number stands for one content, as it does for a peer that signs with one key.
    announcements = [announcement(peer(n), sequence=s, free_tokens=s) for n, s in said]
    forwards, shuffled = Directory(), Directory()
    forwards.fold(announcements, NOW_S)
    again = announcements * 2
    rng.shuffle(again)
    for one in again:
        shuffled.fold([one], NOW_S)
    assert live(forwards) == live(shuffled)
    assert {a.peer_id: a.sequence for a in live(forwards)} == {
        peer(n): max(s for m, s in said if m == n) for n in {n for n, _ in said}
    }


def test_a_peer_disappears_when_its_record_expires() -> None:
    directory = Directory()
    directory.fold([announcement(peer(1), expires_at_s=NOW_S + 20)], NOW_S)
    assert len(live(directory, NOW_S + 19.9)) == 1
    assert not live(directory, NOW_S + 20)


def test_a_peer_whose_clock_is_behind_stays_listed_while_it_renews() -> None:
    directory = Directory()
    for renewal in range(5):
        now_s = NOW_S + 6 * renewal
        behind = announcement(peer(1), sequence=renewal, expires_at_s=now_s - 1)
        directory.fold([behind], now_s)
        assert live(directory, now_s + 5.9) == {behind}
    # Reading the last record again and again does not keep it alive beyond what verification would accept.
    for step in range(20):
        directory.fold([behind], now_s + step)
    assert not live(directory, behind.expires_at_s + CLOCK_SLACK_S)


def test_whoever_sees_a_record_first_in_its_last_seconds_counts_it_no_longer_than_it_says() -> None:
    old, directory = announcement(peer(1), expires_at_s=NOW_S + 3), Directory()
    directory.fold([old], NOW_S)
    assert live(directory, NOW_S + 2.9) == {old}
    assert not live(directory, NOW_S + 3)
    kept = announcement(peer(2), expires_at_s=NOW_S - 3)  # by who stores it, past what it says: it came late
    directory.fold([kept], NOW_S)
    assert live(directory, NOW_S + CLOCK_SLACK_S - 3.1) == {kept}
    assert not live(directory, NOW_S + CLOCK_SLACK_S - 3)


def test_a_record_counts_for_one_lifetime_after_the_one_before_it_was_read_last() -> None:
    directory = Directory()
    old = announcement(peer(1), expires_at_s=NOW_S + 5)
    for second in (0, 4, 8):  # it is over by then, and read on
        directory.fold([old], NOW_S + second)
        assert bool(live(directory, NOW_S + second)) == (second < 5)
    new = replace(old, sequence=2, expires_at_s=NOW_S + 19)
    directory.fold([new], NOW_S + 17)
    assert live(directory, NOW_S + 27.9) == {new}
    assert not live(directory, NOW_S + 28)


def test_a_peer_whose_clock_is_ahead_is_gone_one_lifetime_after_its_last_record_appeared() -> None:
    directory = Directory()
    ahead = announcement(peer(1), expires_at_s=NOW_S + RECORD_LIFETIME_S + 100)
    for second in range(110):  # read again and again as long as nodes keep it
        directory.fold([ahead], NOW_S + second)
        assert live(directory, NOW_S + second) == ({ahead} if second < RECORD_LIFETIME_S else set())
    renewed = replace(ahead, sequence=2, expires_at_s=NOW_S + 230)
    directory.fold([ahead, renewed], NOW_S + 110)
    assert live(directory, NOW_S + 129) == {renewed}


def test_what_expired_does_not_come_back_while_it_can_still_be_read() -> None:
    directory = Directory()
    dead = announcement(peer(1), expires_at_s=NOW_S + 20)
    directory.fold([dead], NOW_S)
    for second in range(20, 30):
        assert not live(directory, NOW_S + second)
        directory.fold([dead], NOW_S + second)


def test_a_record_that_is_expired_beyond_the_slack_does_not_enter() -> None:
    directory = Directory()
    directory.fold([announcement(peer(1), expires_at_s=NOW_S - CLOCK_SLACK_S)], NOW_S)
    assert not live(directory)


def test_the_directory_is_bounded_and_newcomers_do_not_push_out_those_who_renew() -> None:
    directory = Directory(max_peers=3)
    first = [announcement(peer(n)) for n in range(3)]
    directory.fold(first, NOW_S)
    directory.fold([announcement(peer(n), expires_at_s=NOW_S + 300) for n in range(10, 50)], NOW_S)
    assert live(directory) == set(first)
    renewed = [replace(a, sequence=2, expires_at_s=NOW_S + 26) for a in first]
    directory.fold(renewed, NOW_S + 6)
    assert live(directory, NOW_S + 25) == set(renewed)


def test_expired_peers_make_room_in_a_full_directory() -> None:
    directory = Directory(max_peers=1)
    directory.fold([announcement(peer(1))], NOW_S)
    late = announcement(peer(2), expires_at_s=NOW_S + 50)
    directory.fold([late], NOW_S + 30)
    assert live(directory, NOW_S + 30) == {late}


def test_a_snapshot_never_changes_and_is_reused_while_nothing_does() -> None:
    directory = Directory()
    directory.fold([announcement(peer(1))], NOW_S)
    before = directory.snapshot(NOW_S)
    assert directory.snapshot(NOW_S + 1) is before
    directory.fold([announcement(peer(1))], NOW_S + 1)
    assert directory.snapshot(NOW_S + 1) is before
    directory.fold([announcement(peer(2), model=OTHER_MODEL)], NOW_S + 1)
    after = directory.snapshot(NOW_S + 1)
    assert [a.peer_id for a in before.peers] == [peer(1)]
    assert [a.peer_id for a in after.of_model(MODEL)] == [peer(1)]
    assert [a.peer_id for a in after.of_model(OTHER_MODEL)] == [peer(2)]
    directory.says(peer(1), PeerState.DRAINING)
    leaving = directory.snapshot(NOW_S + 1)
    assert [a.state for a in leaving.of_model(MODEL)] == [PeerState.DRAINING]
    directory.says(peer(1), PeerState.DRAINING)
    assert directory.snapshot(NOW_S + 1) is leaving
    assert directory.snapshot(NOW_S + 60).of_model(MODEL) == ()


def test_a_peer_that_changes_its_model_leaves_the_old_one() -> None:
    directory = Directory()
    directory.fold([announcement(peer(1)), announcement(peer(1), model=OTHER_MODEL, sequence=2)], NOW_S)
    snapshot = directory.snapshot(NOW_S)
    assert snapshot.of_model(MODEL) == ()
    assert len(snapshot.of_model(OTHER_MODEL)) == 1
