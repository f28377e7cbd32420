"""Who may write into a storing node's table, and who stays when it is full."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peers.transport.record_table import WAY_S, RecordTable
from routing.directory import Directory
from routing.errors import InvalidRecord
from routing.records import (
    CLOCK_SLACK_S,
    MAX_EXPIRY_AHEAD_S,
    RECORD_LIFETIME_S,
    index_key,
    model_key,
    verify_record,
)
from routing.store import StoredRecord
from tests.peers.transport.nodes import MODEL, NETWORK, record, signing_key

NOW_S = 1_750_000_000.0


def made(number: int, *, sequence: int = 1, lifetime_s: float = 20.0, under: str | None = None) -> StoredRecord:
    return record(signing_key(number), sequence=sequence, expires_at_s=NOW_S + lifetime_s, under=under)


def same_bucket(count: int) -> list[int]:
    """Numbers of peers that announce under one key."""
    numbers: dict[str, list[int]] = {}
    for number in range(1, 1000):
        bucket = numbers.setdefault(model_key(NETWORK, MODEL, signing_key(number).peer_id), [])
        bucket.append(number)
        if len(bucket) == count:
            return bucket
    raise AssertionError


def put(table: RecordTable, one: StoredRecord, *, now_s: float = NOW_S) -> None:
    table.put(one, sender=one.subkey, now_s=now_s)


@pytest.mark.parametrize(
    ("lifetime_s", "kept_s"),
    [
        (RECORD_LIFETIME_S, RECORD_LIFETIME_S),
        (RECORD_LIFETIME_S - WAY_S, RECORD_LIFETIME_S - WAY_S),
        (RECORD_LIFETIME_S - 5, RECORD_LIFETIME_S),  # one of both clocks is wrong
        (-5, CLOCK_SLACK_S - 5),
        (100, 100),
    ],
)
def test_a_record_is_kept_for_one_lifetime_within_its_slack_or_for_as_long_as_it_says(
    lifetime_s: float, kept_s: float
) -> None:
    table = RecordTable()
    one = made(1, lifetime_s=lifetime_s)
    put(table, one)
    assert table.get(one.key, now_s=NOW_S + kept_s - 0.1) == [one]
    assert table.get(one.key, now_s=NOW_S + kept_s) == []
    assert len(table) == 0


def test_who_looks_for_the_first_time_one_lifetime_after_the_last_record_finds_nobody() -> None:
    table = RecordTable()
    one = made(1)
    put(table, one)

    def look(at_s: float) -> bool:
        found = table.get(one.key, now_s=at_s)
        fields = {"key": one.key, "subkey": one.subkey, "stored_expiry_s": one.expires_at_s, "now_s": at_s}
        newcomer = Directory()
        newcomer.fold([verify_record(each.value, **fields) for each in found], at_s)
        return bool(newcomer.snapshot(at_s).peers)

    assert [look(NOW_S + after_s) for after_s in (0.0, 19.9, 20.0, 25.0, 29.9)] == [True, True, False, False, False]


SEEDS = st.integers(0, 2**32)


class Watched:
    """A peer that renews its record every six seconds until it dies, and a reader."""

    def __init__(self, *, behind_s: float, renewals: int, seed: int) -> None:
        self.puts, rng = [], random.Random(seed)
        for renewal in range(renewals):
            made_at_s = NOW_S + 6.0 * renewal
            one = record(signing_key(1), sequence=renewal, expires_at_s=made_at_s + RECORD_LIFETIME_S - behind_s)
            self.puts.append((made_at_s + rng.uniform(0, 0.5), one))
        self.dies_at_s = self.puts[-1][0]
        self.table, self.directory = RecordTable(), Directory()

    def look(self, began_s: float, answered_s: float) -> None:
        while self.puts and self.puts[0][0] <= answered_s:
            at_s, one = self.puts.pop(0)
            put(self.table, one, now_s=at_s)
        found = self.table.get(made(1).key, now_s=answered_s)
        fields = {"key": made(1).key, "subkey": made(1).subkey, "now_s": answered_s}
        self.directory.fold(
            [verify_record(each.value, stored_expiry_s=each.expires_at_s, **fields) for each in found], began_s
        )

    def listed(self, at_s: float) -> bool:
        return bool(self.directory.snapshot(at_s).peers)


@settings(max_examples=200)
@given(
    st.integers(1, 4),
    st.floats(0, 60),
    st.lists(st.tuples(st.floats(0.1, 30), st.floats(0, 1)), max_size=12),
    SEEDS,
)
def test_the_dead_with_a_true_clock_are_gone_one_lifetime_after_their_last_renewal_for_everybody_whenever_they_look(
    renewals: int, first_s: float, looks: list[tuple[float, float]], seed: int
) -> None:
    watched, at_s = Watched(behind_s=0.0, renewals=renewals, seed=seed), NOW_S + first_s
    for wait_s, took_s in [(0.0, 0.0), *looks]:
        watched.look(at_s + wait_s, at_s + wait_s + took_s)
        at_s += wait_s + took_s
        assert not (watched.listed(at_s) and at_s >= watched.dies_at_s + RECORD_LIFETIME_S)
        assert not watched.listed(max(at_s, watched.dies_at_s + RECORD_LIFETIME_S))


@settings(max_examples=100)
@given(st.floats(-100, 18), st.floats(0, 30), SEEDS)
def test_a_peer_is_listed_while_it_renews_however_far_its_clock_is_ahead_and_up_to_eighteen_seconds_behind(
    behind_s: float, first_s: float, seed: int
) -> None:
    """From the first record that is read on up to eight seconds behind, else from the second one on."""
    watched, rng = Watched(behind_s=behind_s, renewals=20, seed=seed), random.Random(seed)
    at_s, sequences = NOW_S + 0.5 + first_s, set[int]()
    while at_s < watched.dies_at_s:
        answered_s = at_s + rng.uniform(0, 0.3)
        watched.look(at_s, answered_s)
        sequences |= {a.sequence for a in watched.directory.snapshot(answered_s).peers}
        next_s = answered_s + rng.uniform(0.5, 4.5)
        while answered_s < next_s + 0.3:  # until the next look is answered
            assert watched.listed(answered_s) or (behind_s > 8 and len(sequences) <= 1)
            answered_s += 0.1
        at_s = next_s


def test_only_the_announced_peer_itself_may_write() -> None:
    table = RecordTable()
    with pytest.raises(InvalidRecord, match="may not store"):
        table.put(made(1), sender=signing_key(2).peer_id, now_s=NOW_S)


def test_a_higher_sequence_replaces_and_a_lower_one_is_refused() -> None:
    table = RecordTable()
    put(table, made(1, sequence=5))
    put(table, made(1, sequence=6, lifetime_s=10))
    with pytest.raises(InvalidRecord, match="sequence 5 is not above 6"):
        put(table, made(1, sequence=5))
    put(table, made(1, sequence=6, lifetime_s=10))  # the very same again
    with pytest.raises(InvalidRecord, match="sequence 6 is not above 6"):
        put(table, made(1, sequence=6, lifetime_s=11))
    assert table.get(made(1).key, now_s=NOW_S) == [made(1, sequence=6, lifetime_s=10)]


@pytest.mark.parametrize("lifetime_s", [-CLOCK_SLACK_S - 1, MAX_EXPIRY_AHEAD_S + 1, float("nan")])
def test_an_expiry_out_of_range_is_refused_and_skew_is_named(lifetime_s: float) -> None:
    stored = replace(made(1), expires_at_s=NOW_S + lifetime_s)
    with pytest.raises(InvalidRecord) as refusal:
        put(RecordTable(), stored)
    assert "clock skew" in refusal.value.hint


def test_an_old_record_with_a_later_expiry_is_refused() -> None:
    table = RecordTable()
    one = made(1)
    put(table, one)
    with pytest.raises(InvalidRecord, match="another expiry"):
        put(table, replace(one, expires_at_s=one.expires_at_s + 100))
    assert table.get(one.key, now_s=NOW_S) == [one]


def test_in_a_full_key_those_present_may_renew_and_newcomers_wait() -> None:
    first, second, newcomer = same_bucket(3)
    table = RecordTable(max_records_per_key=2)
    put(table, made(first))
    put(table, made(second, lifetime_s=40))
    with pytest.raises(InvalidRecord, match="is full"):
        put(table, made(newcomer))
    put(table, made(second, sequence=2, lifetime_s=45))
    after_first_s = NOW_S + 20 + CLOCK_SLACK_S
    put(table, made(newcomer, lifetime_s=50), now_s=after_first_s)
    assert len(table.get(made(first).key, now_s=after_first_s)) == 2


def test_a_peer_cannot_fill_the_table_with_keys_and_the_table_has_an_end() -> None:
    table = RecordTable(max_keys_per_peer=1)
    put(table, made(1))
    with pytest.raises(InvalidRecord, match="announces under 1 keys"):
        put(table, made(1, under=index_key(NETWORK, signing_key(1).peer_id)))
    table = RecordTable(max_records=1)
    put(table, made(1))
    with pytest.raises(InvalidRecord, match="table is full"):
        put(table, made(2))


NUMBERS = same_bucket(4)


class TableMachine(RuleBasedStateMachine):
    """Random puts and waits against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RecordTable(max_records_per_key=3)
        self.now_s = NOW_S
        self.model: dict[str, tuple[StoredRecord, int, float]] = {}
        """With the sequence, and until when."""

    def live(self) -> dict[str, tuple[StoredRecord, int, float]]:
        return {subkey: held for subkey, held in self.model.items() if held[2] > self.now_s}

    @rule(number=st.sampled_from(NUMBERS), sequence=st.integers(1, 4), lifetime_s=st.integers(1, 60))
    def put(self, number: int, sequence: int, lifetime_s: int) -> None:
        expires_at_s = self.now_s + lifetime_s
        one = record(signing_key(number), sequence=sequence, expires_at_s=expires_at_s)
        self.model = self.live()
        held = self.model.get(one.subkey)
        allowed = len(self.model) < 3 if held is None else held[0] == one or held[1] < sequence
        try:
            self.table.put(one, sender=one.subkey, now_s=self.now_s)
        except InvalidRecord:
            assert not allowed
        else:
            assert allowed
            if held is None or held[0] != one:
                in_time = lifetime_s >= RECORD_LIFETIME_S - WAY_S
                until_s = lifetime_s if in_time else min(RECORD_LIFETIME_S, lifetime_s + CLOCK_SLACK_S)
                self.model[one.subkey] = (one, sequence, self.now_s + until_s)

    @precondition(lambda self: self.model)
    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @invariant()
    def holds_what_it_should(self) -> None:
        expected = [one for one, _, _ in self.live().values()]
        held = self.table.get(made(NUMBERS[0]).key, now_s=self.now_s)
        assert sorted(held, key=lambda one: one.subkey) == sorted(expected, key=lambda one: one.subkey)
        assert len(self.table) == len(expected)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
