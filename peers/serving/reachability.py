"""Can others reach this node? Another node dials back on a fresh connection and says how it went.

Any node answers such requests, within limits that keep it from being used to probe third parties: it dials only the
address that the asking node is seen from, a few addresses at a time, rarely (as libp2p's AutoNAT, specs/autonat).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peers.errors import Busy, ProtocolError
from peers.transport.dialling import DIAL_TIMEOUT_S, endpoint, greeting_problem
from peers.transport.links import Link, Links
from peers.wire.messages import DialBack, DialBackReply
from routing.addresses import peer_id_in
from routing.errors import PeerError
from routing.ids import PeerId

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 5.0
MAX_CONCURRENT = 4
MAX_ROUNDS = 4
"""How often helpers are asked that have other dials under way, or were asked by us just now."""
RETRY_S = 30.0
"""Between two looks as long as nobody reaches this node: its owner may be setting up the router."""
LOOK_S = 2.0
"""How often the transport looks for new addresses, too."""
_TOO_OFTEN = "asked too often; try later"
_NO_TCP = "not a TCP address"
_ELSEWHERE = "not where you come from"


class DialBackService:
    """Answers other nodes' requests to be dialled back."""

    def __init__(self, links: Links, clock: Callable[[], float] = time.monotonic) -> None:
        self._links = links
        self._clock = clock
        self._last_s: OrderedDict[PeerId, float] = OrderedDict()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        links.handle(DialBack, self._answer)

    async def _answer(self, link: Link, message: DialBack, _: memoryview) -> None:
        now_s = self._clock()
        if now_s - self._last_s.get(link.remote, -MIN_INTERVAL_S) < MIN_INTERVAL_S or self._slots.locked():
            results = tuple((address, _TOO_OFTEN) for address in message.addresses)
        else:
            self._last_s[link.remote] = now_s
            self._last_s.move_to_end(link.remote)
            while len(self._last_s) > 1024:
                self._last_s.popitem(last=False)
            seen = await self._links.transport.observed_addresses(link.remote)
            hosts = {where[0] for address in seen if (where := endpoint(address))}
            async with self._slots:
                outcomes = await asyncio.gather(*(_try(address, hosts) for address in message.addresses))
            results = tuple(zip(message.addresses, outcomes, strict=True))
        await link.send(DialBackReply(nonce=message.nonce, results=results))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What another node found when it dialled this one."""

    reached: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    """Address → what went wrong."""
    unasked: str = field(default="", compare=False)
    """Why nobody could be asked; the others are empty then."""

    @property
    def vain(self) -> frozenset[str]:
        """Addresses that were dialled, and nobody was there. Others are not dialled for strangers, and may be good."""
        return frozenset(a for a, problem in self.problems.items() if not problem.startswith((_NO_TCP, _ELSEWHERE)))


async def watch_reachability(
    links: Links,
    helpers: Sequence[str],
    tell: Callable[[Verdict], None],
    withdraw: Callable[[frozenset[str]], None] = lambda _: None,
) -> None:
    """Tell the first verdict and each that differs, until cancelled. `helpers`: full addresses of other nodes.

    They are asked again every RETRY_S seconds until this node is reached, and whenever its own addresses change.
    `withdraw` is told by each verdict which addresses were dialled in vain then and the time before: one dial may fail.
    """
    told: Verdict | None = None
    vain: frozenset[str] = frozenset()
    while True:
        own = links.transport.addresses
        verdict = await find_out(links, helpers, own)
        if verdict != told:
            tell(verdict)
            told = verdict
        if not verdict.unasked:
            withdraw(vain & verdict.vain)
            vain = verdict.vain
        try:
            async with asyncio.timeout(None if verdict.reached else RETRY_S):
                while links.transport.addresses == own:  # noqa: ASYNC110  # a transport tells nobody of a change
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            logger.debug("asking again whether this node can be reached")


async def find_out(links: Links, helpers: Sequence[str], own_addresses: Sequence[str]) -> Verdict:
    """Ask the helpers one after another until one has dialled back; while one of them is busy, several times."""
    addresses: dict[PeerId, list[str]] = {}
    for address in helpers:
        peer = peer_id_in(address)
        if peer is not None and peer != links.transport.peer_id:
            addresses.setdefault(peer, []).append(address)
    failures: list[str] = []
    for _ in range(MAX_ROUNDS):
        failures, retry_after_s = [], 0.0
        for helper, where in addresses.items():
            try:
                results = await ask_to_dial_back(links, helper, where, own_addresses)
            except Busy as error:
                failures.append(str(error))
                retry_after_s = error.retry_after_s
            except PeerError as error:
                failures.append(str(error))
            else:
                return Verdict(
                    reached=tuple(address for address, problem in results.items() if not problem),
                    problems={address: problem for address, problem in results.items() if problem},
                )
        if not retry_after_s:
            break
        await asyncio.sleep(retry_after_s)
    return Verdict(unasked="; ".join(failures) or "there is no other node to ask")


async def ask_to_dial_back(
    links: Links, helper: PeerId, helper_addresses: Sequence[str], own_addresses: Sequence[str]
) -> dict[str, str]:
    """Ask `helper` to dial `own_addresses`; maps each to "" (reached) or to what went wrong.

    Raises PeerError, and Busy when the helper dials for others or has dialled for us just now.
    """
    link = await links.to(helper, helper_addresses)
    reply = await links.request(
        link,
        lambda nonce: DialBack(nonce=nonce, addresses=tuple(own_addresses[:8])),
        timeout_s=DIAL_TIMEOUT_S + 5.0,
    )
    if not isinstance(reply, DialBackReply):
        raise ProtocolError(f"{helper} answered a request to dial back with {type(reply).__name__}")
    if any(problem == _TOO_OFTEN for _, problem in reply.results):
        raise Busy(f"{helper} was asked too often", retry_after_s=MIN_INTERVAL_S)
    return dict(reply.results)


async def _try(address: str, allowed_hosts: set[str]) -> str:
    where = endpoint(address)
    if where is None:
        return _NO_TCP
    if where[0] not in allowed_hosts:
        return f"{_ELSEWHERE} ({', '.join(sorted(allowed_hosts)) or 'unknown'})"
    return await greeting_problem(*where)
