"""The order in which a node starts: what can be refused is refused before anything takes time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers.errors import AddressInUse, InsecureIdentity
from peers.host import BootstrapConfig, Event, PeerConfig, run_bootstrap, run_peer
from routing.errors import CallerError, SwarmError
from routing.records import MAX_MODEL_NAME_CHARS
from tests.helpers.families import FAMILIES, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

LISTEN = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def peer(tmp_path: Path, **options: Any) -> PeerConfig:
    return PeerConfig(
        **{"model": "./nowhere", "network": "hive", "identity": tmp_path / "own.key", "listen": (LISTEN,)} | options
    )


async def refusal(config: PeerConfig) -> SwarmError:
    with pytest.raises(SwarmError) as caught:
        await run_peer(config, emit=lambda event: None, stop=asyncio.Event())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"device": "meta"}, "unknown device"),
        ({"device": "cuda:77"}, "is not here"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"cache_tokens": 15}, "do not make one page"),
    ],
)
async def test_a_bad_option_is_refused_before_the_model_is_looked_for(
    option: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    assert complaint in str(await refusal(peer(tmp_path, **option)))


async def test_a_bad_identity_or_port_is_refused_before_the_model_is_looked_for(tmp_path: Path, taken: int) -> None:
    assert isinstance(await refusal(peer(tmp_path, listen=(f"/ip4/127.0.0.1/tcp/{taken}",))), AddressInUse)
    (tmp_path / "own.key").chmod(0o644)
    assert isinstance(await refusal(peer(tmp_path)), InsecureIdentity)


@pytest.mark.parametrize("option", [{"name": "n" * 49}, {"name": "\x1b[2J"}, {"network": "My Network"}])
def test_a_name_that_no_record_can_carry_is_refused_at_once(option: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        peer(tmp_path, **option)
    assert caught.value.hint
    with pytest.raises(CallerError):
        BootstrapConfig(network="My Network", identity=tmp_path / "own.key")


async def test_the_port_of_the_first_start_is_remembered_also_when_it_is_once_taken(tmp_path: Path, taken: int) -> None:
    async def ports() -> set[str]:
        """Where a bootstrap listens, that is started and stopped."""
        ready: list[Event] = []
        stop = asyncio.Event()

        def emit(event: Event) -> None:
            ready.append(event)
            stop.set()

        await run_bootstrap(BootstrapConfig(network="hive", identity=tmp_path / "own.key"), emit=emit, stop=stop)
        addresses = ready[0].fields["addresses"]
        assert isinstance(addresses, list)
        return {address.split("/")[4] for address in addresses}

    (first,) = await ports()
    assert await ports() == {first}
    (tmp_path / "own.port").write_text(str(taken))
    (other,) = await ports()
    assert other not in (first, str(taken))
    assert (tmp_path / "own.port").read_text() == str(taken)


def test_a_long_name_of_a_model_is_announced_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("m" * MAX_MODEL_NAME_CHARS)
    save_checkpoint(FAMILIES["llama"], folder)
    with MemorySwarm(folder, [(0, 1)], cache=tmp_path / "cache") as swarm:
        assert swarm.peers[0]._describe(1, 0.0).model_name == folder.name
