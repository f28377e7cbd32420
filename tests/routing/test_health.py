from __future__ import annotations

from routing.directory import Directory, Snapshot
from routing.health import adapters, coverage, models
from routing.records import Announcement, HostedAdapter, PeerState
from tests.routing.swarms import MODEL, NOW_S, OTHER_MODEL, announcement, peer


def snapshot(*announcements: Announcement) -> Snapshot:
    directory = Directory()
    directory.fold(announcements, NOW_S)
    return directory.snapshot(NOW_S)


def test_every_block_lists_its_holders_and_the_rarest_gives_the_replication() -> None:
    health = coverage(snapshot(announcement(peer(1), 0, 20), announcement(peer(2), 10, 30)), MODEL)
    assert health is not None
    assert health.num_blocks == 30
    assert health.holders[5] == (peer(1),)
    assert health.holders[15] == (peer(1), peer(2))
    assert health.holders[25] == (peer(2),)
    assert health.replication == 1
    assert health.gaps == ()
    assert health.healthy


def test_gaps_are_named_and_only_online_peers_with_an_address_hold_blocks() -> None:
    health = coverage(
        snapshot(
            announcement(peer(1), 0, 10),
            announcement(peer(2), 10, 20, state=PeerState.JOINING),
            announcement(peer(3), 20, 30, state=PeerState.DRAINING),
            announcement(peer(4), 20, 30, state=PeerState.PAUSED),
            announcement(peer(5), 20, 30, addresses=()),
        ),
        MODEL,
    )
    assert health is not None
    assert [str(gap) for gap in health.gaps] == ["10:30"]
    assert health.replication == 0
    assert not health.healthy
    assert {a.peer_id for a in health.peers} == {peer(n) for n in range(1, 6)}


def test_a_liar_about_the_number_of_blocks_is_left_out() -> None:
    seen = snapshot(
        announcement(peer(1), 0, 30),
        announcement(peer(2), 0, 30),
        announcement(peer(3), 0, 40, num_blocks=4000),
    )
    health = coverage(seen, MODEL)
    assert health is not None
    assert (health.num_blocks, len(health.peers)) == (30, 2)
    told = coverage(seen, MODEL, num_blocks=4000)
    assert told is not None
    assert (told.num_blocks, len(told.peers)) == (4000, 1)


def test_a_model_that_nobody_announces_has_no_health() -> None:
    assert coverage(snapshot(), MODEL) is None
    assert coverage(snapshot(announcement(peer(1))), OTHER_MODEL) is None
    assert coverage(snapshot(announcement(peer(1))), MODEL, num_blocks=7) is None


def test_models_are_listed_by_name() -> None:
    seen = snapshot(
        announcement(peer(1), model_name="zebra"),
        announcement(peer(2), model=OTHER_MODEL, model_name="ant"),
        announcement(peer(3), model=OTHER_MODEL, model_name="ant"),
        announcement(peer(4), model=OTHER_MODEL, model_name="anteater"),
    )
    assert [(health.model_name, health.model) for health in models(seen)] == [("ant", OTHER_MODEL), ("zebra", MODEL)]


def test_an_adapter_is_complete_where_its_own_hosts_cover_the_model() -> None:
    poet, pirate = HostedAdapter("poet", bytes(16)), HostedAdapter("pirate", b"p" * 16)
    rival = HostedAdapter("poet", b"r" * 16)
    health = coverage(
        snapshot(
            announcement(peer(1), 0, 20, adapters=(poet, pirate)),
            announcement(peer(2), 20, 30, adapters=(poet,)),
            announcement(peer(3), 20, 30, adapters=(pirate,), state=PeerState.PAUSED),
            announcement(peer(4), 10, 20, adapters=(rival,)),
        ),
        MODEL,
    )
    assert health is not None
    said = [(each.adapter, each.hosts, [str(gap) for gap in each.gaps]) for each in adapters(health)]
    assert said == [(pirate, 1, ["20:30"]), (poet, 2, []), (rival, 1, ["0:10", "20:30"])]
    assert [each.adapter for each in adapters(health, most=2)] == [pirate, poet]
