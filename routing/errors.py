"""Every error of the project hangs from SwarmError.

The second level says who must act; each package defines its own leaves below it.

    SwarmError
    ├── CallerError            our own caller erred: fix the argument and call again
    │   ├── InvalidAddress         (routing) a multiaddr, peer id or invite that cannot be read
    │   ├── InvalidSpan            (routing) a block range that does not exist
    │   └── …                      leaves in peers.errors and swarm.errors
    ├── PeerError              one remote peer erred: avoid it, say so, carry on
    │   ├── InvalidRecord          (routing) an announcement that is malformed, forged or expired
    │   └── …
    └── Unavailable            nobody can serve this now: wait, retry, or add peers
        └── NoRoute                (routing) blocks that no reachable peer holds

The text says what is wrong; `hint` says what to do next. The command line prints both, on one line each.
"""

from __future__ import annotations

from collections.abc import Sequence


class SwarmError(Exception):
    """Root of the tree. `str(error)` is one clear sentence; `hint` names the next step, or is empty."""

    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.default_hint


class CallerError(SwarmError):
    """The caller of this process erred; repeating the call unchanged cannot succeed."""


class PeerError(SwarmError):
    """One remote peer misbehaved or failed; another peer may succeed."""

    default_hint = "another peer may succeed: try again"


class Unavailable(SwarmError):
    """Nobody can serve this now; waiting or adding peers may help."""

    default_hint = "wait a little and try again"


class InvalidAddress(CallerError):
    """A multiaddr, peer id or invite that cannot be read."""

    default_hint = "write for example /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo…, or copy the whole address or invite again"


class InvalidSpan(CallerError):
    """A block range that is empty, reversed or outside the model."""

    default_hint = "write A:B with 0 <= A < B, within the model's blocks; B is not included"


class InvalidRecord(PeerError):
    """An announcement that is malformed, forged, expired or stored under the wrong key."""

    default_hint = "update that peer, and set the clocks of both machines"


class NoRoute(Unavailable):
    """No chain of reachable peers covers every block; `missing` lists the uncovered `(start, end)` ranges, `late` says
    that peers hold them which did not answer in time and may yet."""

    default_hint = "start a peer that hosts the missing blocks (`swarm join MODEL --blocks A:B`) or wait for one"

    def __init__(
        self, message: str, *, missing: Sequence[tuple[int, int]] = (), late: bool = False, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = tuple(missing)
        self.late = late
