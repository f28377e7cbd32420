"""Adapters by name: announced within bounds, asked for by routes, and never another one than was meant."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.errors import CallerError, NoRoute
from routing.hosting import find_adapter
from routing.records import MAX_ADAPTERS, HostedAdapter
from routing.router import Router
from routing.routes import RouteRequest
from tests.routing.swarms import MODEL, NOW_S, announcement, peer

POET, RIVAL = HostedAdapter("poet", b"\xab" * 16), HostedAdapter("poet", b"\xac" + bytes(15))
PIRATE = HostedAdapter("pirate", bytes(16))
REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=1152)


def hosting(number: int, *adapters: HostedAdapter, start: int = 0, end: int = 30) -> object:
    return announcement(peer(number), start, end, adapters=adapters)


def test_a_name_means_one_adapter_or_must_be_told_apart() -> None:
    peers = [hosting(0, POET, PIRATE), hosting(1, POET)]
    assert find_adapter(peers, "poet") == POET
    assert find_adapter(peers, "poet@abab") == POET
    assert find_adapter(peers, "poet@AC") is None
    assert find_adapter(peers, "pilot") is None
    peers.append(hosting(2, RIVAL))
    with pytest.raises(CallerError, match="2 different adapters called poet") as raised:
        find_adapter(peers, "poet")
    assert "poet@abababababab, poet@ac0000000000" in raised.value.hint
    assert find_adapter(peers, "poet@ac") == RIVAL
    for wrong in ("", "a b", "poet@", "poet@..", "x" * 33, "@ab"):
        with pytest.raises(CallerError):
            find_adapter(peers, wrong)


def test_a_route_goes_over_peers_that_host_the_adapter_and_a_gap_of_it_is_named() -> None:
    router = Router()
    peers = [hosting(n, PIRATE, start=10 * n, end=10 * n + 10) for n in range(3)]
    router.on_announcements([hosting(9), hosting(8, RIVAL), *peers], NOW_S)
    route = router.plan(replace(REQUEST, adapter=PIRATE), NOW_S)
    assert [hop.peer_id for hop in route.hops] == [peer(0), peer(1), peer(2)]
    router.on_failure(peer(1), NOW_S, "stream closed")
    with pytest.raises(NoRoute, match="with adapter pirate@000000000000: blocks 10:20 are missing") as raised:
        router.plan(replace(REQUEST, adapter=PIRATE), NOW_S)
    assert raised.value.missing == ((10, 20),)
    assert len(router.plan(REQUEST, NOW_S).hops) == 1


@pytest.mark.parametrize("adapters", [[POET] * (MAX_ADAPTERS + 1), [HostedAdapter("a\n", bytes(16))], [("a", b"")]])
def test_what_no_record_carries_is_refused(adapters: list[HostedAdapter]) -> None:
    with pytest.raises(CallerError):
        hosting(0, *(HostedAdapter(*adapter) for adapter in adapters))
