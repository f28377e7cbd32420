"""Can a peer be reached from here, and if not, what is wrong? Each thing that can be, tried in order.

Owns the checks and their words. Limits on who may ask, and for what, are the application's: it dials.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from peers.errors import PeerUnreachable, VersionMismatch
from peers.transport.dialling import endpoint, greeting_problem
from peers.transport.links import Links
from routing.addresses import is_public, is_relayed
from routing.errors import PeerError, SwarmError
from routing.ids import PeerId
from routing.records import MAX_ADDRESSES, Announcement
from swarm.dashboard.peers import printable
from swarm.dashboard.schemas import GONE, Check, Reachability, State

CALL_TIMEOUT_S = 6.0
_HINT_NO_ADDRESS = "forward its TCP port to it and start it with --announce /ip4/PUBLIC_IP/tcp/PORT"


async def look(
    links: Links, peer: PeerId, addresses: Sequence[str], *, record: Announcement | None, state: State | None
) -> Reachability:
    """Dial each address, then speak with the peer. `addresses`: validated, and this peer's. `links` reach it by these
    alone: with a connection of before, an address that leads nowhere would do."""
    checks = [_announced(record, state)]
    addresses = addresses[:MAX_ADDRESSES]
    direct = {address: where for address in addresses if not is_relayed(address) and (where := endpoint(address))}
    problems = await asyncio.gather(*(greeting_problem(*where) for where in direct.values()))
    for (host, port), problem in zip(direct.values(), problems, strict=True):
        detail = printable(problem, 200) or "a peer-to-peer node answers"
        checks.append(Check(what=f"TCP connection to {host} port {port}", ok=not problem, detail=detail))
    rtt_s: float | None = None
    problem, hint = "it announces no address", _HINT_NO_ADDRESS
    if addresses:
        try:
            rtt_s, _ = await links.ping(peer, addresses, timeout_s=CALL_TIMEOUT_S)
            problem = hint = ""
        except PeerError as error:
            problem = printable(str(error), 300)
            hint = _hint_of(error)
        except SwarmError as error:  # of this machine
            problem, hint = printable(str(error), 300), error.hint
    what = "it proves its identity and answers in this network's protocol"
    checks.append(Check(what=what, ok=not problem, detail=problem or f"round trip {1000 * (rtt_s or 0):.1f} ms"))
    if not problem:
        return _reached(peer, rtt_s, addresses, checks)
    if direct and all(problems):
        hint = _hint_of_dials(list(direct), problems)
    elif addresses and all(address.startswith("/dns") and not is_relayed(address) for address in addresses):
        hint = "does that name lead to its machine? Try its IP address; it may have stopped, too"
    return Reachability(
        peer_id=peer,
        reachable=False,
        summary=f"Not reachable from here: {problem}",
        hint=hint,
        rtt_s=None,
        checks=checks,
    )


def _announced(record: Announcement | None, state: State | None) -> Check:
    what = "announced in this swarm"
    if record is None or state is None:
        detail = "no: it runs in another network, has not joined yet, or its clock is wrong"
        return Check(what=what, ok=False, detail=detail)
    if state in GONE:
        return Check(what=what, ok=False, detail="not any more: its last record expired")
    count = len(record.addresses)
    detail = f"yes, {state.value}, blocks {record.spans}, {count} address{'' if count == 1 else 'es'}"
    return Check(what=what, ok=True, detail=detail)


def _reached(peer: PeerId, rtt_s: float | None, addresses: Sequence[str], checks: list[Check]) -> Reachability:
    if all(map(is_relayed, addresses)):
        hint = "only through others, which is slower: forward its TCP port to it, if you can"
    elif not any(map(is_public, addresses)):
        hint = "its addresses are of this machine or a local network: whoever is elsewhere does not reach it by them"
    else:
        hint = ""
    return Reachability(
        peer_id=peer, reachable=True, summary="Reachable from here.", hint=hint, rtt_s=rtt_s, checks=checks
    )


def _hint_of(error: PeerError) -> str:
    if isinstance(error, VersionMismatch):
        return error.hint
    if isinstance(error, PeerUnreachable):
        return "it may have stopped, or another peer runs at this address now: compare the peer id that it prints"
    return error.hint or "look into its output; it may be of another version or network"


def _hint_of_dials(addresses: Sequence[str], problems: Sequence[str]) -> str:
    if any(problem.startswith("refused") for problem in problems):
        return "nothing listens there: is it running, and does the router forward to the right machine and port?"
    if any(problem.startswith("something else") for problem in problems):
        return "another program has that port: does the router forward to the right machine and port?"
    if not any(map(is_public, addresses)):
        return f"these addresses are of a local network: {_HINT_NO_ADDRESS}"
    return "forward the TCP port to that machine in its router, and let it through the firewall"
