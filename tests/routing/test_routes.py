"""What a route is."""

from __future__ import annotations

from routing.ids import BlockSpan, PeerId
from routing.routes import Hop, machines


def test_peers_of_one_host_count_as_one_machine_and_those_behind_a_relay_as_many() -> None:
    def hop(number: int, *hosts: str, relayed: bool = False) -> Hop:
        path = "tcp/1/p2p/RELAY/p2p-circuit" if relayed else f"tcp/{number}/p2p/{number}"
        addresses = tuple(f"/ip4/{host}/{path}" for host in hosts)
        return Hop(peer_id=PeerId(str(number)), span=BlockSpan(number, number + 1), addresses=addresses)

    assert machines([hop(0, "127.0.0.1"), hop(1, "127.0.0.1"), hop(2, "127.0.0.1")]) == 1
    assert machines([hop(0, "10.0.0.1", "1.2.3.4"), hop(1, "10.0.0.2", "1.2.3.4"), hop(2, "1.2.3.4", "10.0.0.1")]) == 2
    assert machines([hop(0, "9.9.9.9", relayed=True), hop(1, "9.9.9.9", relayed=True), hop(2, "9.9.9.9")]) == 3
    assert machines([hop(0), hop(1)]) == 2
