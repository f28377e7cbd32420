"""What one remote peer may have in flight here: bytes received and not yet computed, or computed and not yet read by
whom they are for; and the accounts of what it used.

Pure bookkeeping. Sessions are bounded by the ledger, pages by the engine's pressure policy; both answer "busy", never
"failed", because a full peer is a healthy peer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from peers.errors import Busy
from routing.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds on memory held for strangers' frames."""

    max_bytes_in_flight: int = 512 << 20
    max_bytes_in_flight_per_peer: int = 128 << 20
    """Of one client."""
    max_bytes_in_flight_per_link: int = 256 << 20
    """Of all clients to which one peer is the hop before: more than one of them may have, so that there is room for
    another, and less than there is in all."""
    max_accounts: int = 4096
    """At this number a new account replaces the one that was idle longest; those with bytes in flight stay."""


@dataclass(slots=True)
class Account:
    """What one remote peer used since this node first heard of it."""

    bytes_in_flight: int = 0
    bytes_forwarded: int = 0
    """Other clients' in flight, that came over its link."""
    steps: int = 0
    positions: int = 0
    trained: int = 0
    """Positions, of those, for training."""
    bytes_received: int = 0
    compute_s: float = 0.0
    refused: int = 0

    @property
    def idle(self) -> bool:
        return not (self.bytes_in_flight or self.bytes_forwarded)


class Admission:
    """Accounts by remote peer id, and the gate that reads them."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.accounts: OrderedDict[PeerId, Account] = OrderedDict()
        self._bytes_in_flight = 0

    def account(self, peer: PeerId) -> Account:
        """The peer's account, created when new."""
        account = self.accounts.get(peer)
        if account is None:
            self._forget_idle()
            account = self.accounts[peer] = Account()
        self.accounts.move_to_end(peer)
        return account

    def admit(self, peer: PeerId, payload_bytes: int, via: PeerId | None = None) -> None:
        """Take in what is the client `peer`'s until `finish` with the same; `via`: from whom it comes, if not from
        itself. Raises Busy as `hold`, and where too much of what that one passed on waits here."""
        if via not in (None, peer):
            sender = self.account(via)
            forwarded = sender.bytes_forwarded + payload_bytes
            if forwarded > self.limits.max_bytes_in_flight_per_link:
                sender.refused += 1
                raise Busy(f"{forwarded >> 20} MiB that you pass on are waiting here", retry_after_s=0.5)
            self.hold(peer, payload_bytes)
            self.account(via).bytes_forwarded = forwarded
        else:
            self.hold(peer, payload_bytes)
        self.account(peer).bytes_received += payload_bytes

    def hold(self, peer: PeerId, payload_bytes: int) -> None:
        """Keep so much for `peer` until `finish`. Raises Busy when the peer or the node holds too much."""
        account = self.account(peer)
        total = self._bytes_in_flight + payload_bytes
        mine = account.bytes_in_flight + payload_bytes
        if total > self.limits.max_bytes_in_flight or mine > self.limits.max_bytes_in_flight_per_peer:
            account.refused += 1
            raise Busy(f"{mine >> 20} MiB of yours, {total >> 20} MiB in all are waiting here", retry_after_s=0.5)
        self._bytes_in_flight = total
        account.bytes_in_flight = mine

    def finish(self, peer: PeerId, payload_bytes: int, via: PeerId | None = None) -> None:
        """What brought `payload_bytes`, or was held, has ended, whatever its outcome."""
        if via not in (None, peer):
            self.account(via).bytes_forwarded -= payload_bytes
        self.account(peer).bytes_in_flight -= payload_bytes
        self._bytes_in_flight -= payload_bytes

    def charge(self, peer: PeerId, *, positions: int, compute_s: float, trained: bool = False) -> None:
        """One step, or one work of training, was computed for the client `peer`."""
        account = self.account(peer)
        account.steps += 1
        account.positions += positions
        account.trained += positions * trained
        account.compute_s += compute_s

    def _forget_idle(self) -> None:
        if len(self.accounts) >= self.limits.max_accounts:
            idle = next((peer for peer, account in self.accounts.items() if account.idle), None)
            if idle is not None:
                del self.accounts[idle]
