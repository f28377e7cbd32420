"""What strangers may have in flight: never above the bounds, and back at zero when everything has ended."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peers.errors import Busy
from peers.serving.admission import Admission, AdmissionLimits
from routing.ids import PeerId

LIMITS = AdmissionLimits(
    max_bytes_in_flight=100, max_bytes_in_flight_per_peer=50, max_bytes_in_flight_per_link=75, max_accounts=3
)


def test_a_peer_above_its_share_is_told_to_come_back_and_others_are_not_disturbed() -> None:
    admission = Admission(AdmissionLimits(max_bytes_in_flight=100, max_bytes_in_flight_per_peer=60))
    admission.admit(PeerId("greedy"), 60)
    with pytest.raises(Busy) as caught:
        admission.admit(PeerId("greedy"), 1)
    assert caught.value.retry_after_s > 0
    admission.admit(PeerId("modest"), 40)
    with pytest.raises(Busy):
        admission.admit(PeerId("late"), 1)
    admission.finish(PeerId("greedy"), 60)
    admission.admit(PeerId("late"), 1)
    assert admission.accounts[PeerId("greedy")].refused == 1


def test_one_client_leaves_room_to_others_behind_the_same_hop_and_that_hop_to_others() -> None:
    admission, hop = Admission(LIMITS), PeerId("hop")
    admission.admit(PeerId("greedy"), 50, hop)
    with pytest.raises(Busy, match="of yours"):
        admission.admit(PeerId("greedy"), 1, hop)
    admission.admit(PeerId("modest"), 25, hop)
    with pytest.raises(Busy, match="you pass on"):
        admission.admit(PeerId("invented"), 1, hop)
    assert admission.accounts[hop].refused == admission.accounts[PeerId("greedy")].refused == 1
    admission.admit(hop, 15)
    admission.admit(PeerId("other"), 10, PeerId("other hop"))
    admission.finish(PeerId("greedy"), 50, hop)
    admission.admit(PeerId("invented"), 50, hop)


def test_a_new_peer_gets_an_account_also_while_all_others_have_bytes_in_flight() -> None:
    admission = Admission(AdmissionLimits(max_accounts=2))
    for name in ("a", "b", "c"):
        admission.admit(PeerId(name), 1)
    admission.admit(PeerId("empty"), 0)
    admission.finish(PeerId("a"), 1)
    admission.admit(PeerId("d"), 1)
    admission.finish(PeerId("empty"), 0)
    assert {"b", "c", "d"} <= admission.accounts.keys()


def test_the_account_that_was_idle_longest_is_forgotten_first() -> None:
    admission = Admission(AdmissionLimits(max_accounts=2))
    for name in ("a", "b", "a", "c"):
        admission.charge(PeerId(name), positions=1, compute_s=0.5)
    assert set(admission.accounts) == {"a", "c"}
    assert (admission.accounts[PeerId("a")].positions, admission.accounts[PeerId("a")].compute_s) == (2, 1.0)


class AdmissionMachine(RuleBasedStateMachine):
    peers = st.integers(0, 6).map(lambda number: PeerId(f"peer {number}"))

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(LIMITS)
        self.in_flight: list[tuple[PeerId, int, PeerId | None]] = []
        self.most_busy = 0

    def held(self, peer: PeerId | None = None) -> int:
        return sum(size for owner, size, _ in self.in_flight if peer in (None, owner))

    def forwarded(self, via: PeerId | None) -> int:
        return sum(size for owner, size, sender in self.in_flight if via == sender != owner)

    @rule(peer=peers, size=st.sampled_from([0, 1, 10, 30, 50, 51]), via=st.none() | peers)
    def admit(self, peer: PeerId, size: int, via: PeerId | None) -> None:
        too_much_forwarded = via not in (None, peer) and self.forwarded(via) + size > 75
        if self.held() + size > 100 or self.held(peer) + size > 50 or too_much_forwarded:
            with pytest.raises(Busy):
                self.admission.admit(peer, size, via)
        else:
            self.admission.admit(peer, size, via)
            self.in_flight.append((peer, size, via))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.admission.finish(*self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1))))

    @rule(peer=peers)
    def charge(self, peer: PeerId) -> None:
        self.admission.charge(peer, positions=3, compute_s=0.1)

    @invariant()
    def the_bounds_hold(self) -> None:
        accounts = self.admission.accounts
        assert sum(account.bytes_in_flight for account in accounts.values()) == self.held() <= 100
        for peer, account in accounts.items():
            assert account.bytes_in_flight == self.held(peer) <= 50
            assert account.bytes_forwarded == self.forwarded(peer) <= 75
        busy = {peer for owner, size, via in self.in_flight if size for peer in (owner, via)}
        self.most_busy = max(self.most_busy, len(busy - {None}))
        assert len(accounts) <= max(LIMITS.max_accounts, self.most_busy + 1)

    def teardown(self) -> None:
        for entry in self.in_flight:
            self.admission.finish(*entry)
        assert all(account.idle for account in self.admission.accounts.values())
        self.admission.admit(PeerId("afterwards"), 50)


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
