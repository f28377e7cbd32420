"""What the core of a session asks of its driver, and how the driver answers."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from routing.errors import SwarmError
from routing.ids import PeerId
from routing.routes import Hop, Route
from swarm.session.steps import PendingStep


@dataclass(frozen=True, slots=True)
class NeedRoute:
    """Plan a route without `avoid` and answer with `route_ready` or `no_route`.

    `keep`: hops that hold the session. If others can serve what lies between them, these stay as they are.
    `patience_s`: for so long blocks that nobody offers are waited for; None: as for a new session, not for long.
    """

    avoid: frozenset[PeerId]
    keep: tuple[Hop, ...] = ()
    patience_s: float | None = None


@dataclass(frozen=True, slots=True)
class OpenHops:
    """Install `route` under `epoch`; answer each hop with `opened`, `refused` or `hop_lost`.

    A hop may be asked what it holds of the first `offer` positions: they will be sent as they now stand in the history.
    One of an older route goes on with at most its number in `keep`, and need not be asked unless `forgot`.
    """

    route: Route
    epoch: int
    offer: int
    keep: tuple[int, ...]
    forgot: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Every hop holds the first `positions` of the session already. So much for `steps`: their outputs nobody wants."""

    positions: int
    steps: tuple[PendingStep, ...]


class SendStep(msgspec.Struct, frozen=True):
    """Send to the first hop; where `step.hop` is another one, have the hop before that send it from its journal."""

    step: PendingStep
    epoch: int


class StepDone(msgspec.Struct, frozen=True):
    """The result belongs to this step, which is now answered."""

    step: PendingStep


@dataclass(frozen=True, slots=True)
class Release:
    """Tell these hops to forget the session."""

    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Call `timer` after `delay_s`, spread by up to a half so that clients do not return together."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The session is over; every pending step fails with `error`."""

    error: SwarmError


@dataclass(frozen=True, slots=True)
class NeedStandbys:
    """Find for each of `hops`, if possible, another peer with the same blocks that is none of the route nor in `avoid`,
    and answer with `standbys_found`."""

    hops: tuple[Hop, ...]
    avoid: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class OpenStandby:
    """Install `hop` under `epoch` between the neighbours of the hop with the same blocks; answer with `opened` or
    `standby_lost`. `keep` as in `OpenHops`."""

    hop: Hop
    epoch: int
    keep: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Have `step` sent to a standby, in the background: by the hop before it or, where `step.hop` is 0, from here."""

    to: Hop
    step: PendingStep
    epoch: int


Action = NeedRoute | OpenHops | Skip | SendStep | StepDone | Release | Wait | Fail | NeedStandbys | OpenStandby | Feed
