"""The order in which a node starts: what can be refused is refused before anything takes time."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import capacity
from peers.capacity import FORWARD_BYTES, plan_capacity
from peers.errors import AddressInUse, InsecureIdentity
from peers.host import blocks, run, server
from peers.host.config import BootstrapConfig, PeerConfig
from peers.host.events import Event
from peers.host.presence import Presence
from peers.host.run import run_bootstrap, run_peer
from peers.model.cutting import SpanModel
from peers.model.kernels.pool import pool_for
from peers.model.loading import load_span
from peers.runtime.engine import Engine
from peers.runtime.probe import Probe
from peers.runtime.rough import Speed
from peers.serving.owner import Owner
from peers.serving.reachability import DialBackService, Verdict
from peers.transport.hivemind_p2p import HivemindNode, NodeConfig
from peers.transport.links import Links
from routing.errors import SwarmError
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans
from routing.records import MAX_MODEL_NAME_CHARS
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.hours import hours_without_now
from tests.helpers.memory_swarm import PROBE, MemorySwarm

serve_presence = Presence.serve
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
        assert swarm.peers[0].presence.describe().model_name == folder.name


# --- announcing ---


class Life:
    """A peer of a tiny model from start to stop, and what it said."""

    def __init__(self, config: PeerConfig) -> None:
        self.kinds: list[str] = []
        self.events: dict[str, Event] = {}
        self._said = asyncio.Condition()
        self._stop = asyncio.Event()
        self._config = config

    async def wait_for(self, kind: str) -> Event:
        async with self._said, asyncio.timeout(100):
            await self._said.wait_for(lambda: kind in self.events)
        return self.events[kind]

    def _emit(self, event: Event) -> None:
        self.kinds.append(event.kind)
        self.events[event.kind] = event
        self._tasks.create_task(self._notify())

    async def _notify(self) -> None:
        async with self._said:
            self._said.notify_all()

    async def __aenter__(self) -> Life:
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._tasks.create_task(run_peer(self._config, emit=self._emit, stop=self._stop))
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._stop.set()
        await self._tasks.__aexit__(*error)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pool_for(torch.device("cpu"), 1)  # compiled in time of its own, and once: not into the cache folder of each test
    monkeypatch.setenv("HIVESWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("peers.serving.announce.RECORD_RENEW_S", 0.5)
    monkeypatch.setattr(server, "LOOK_AROUND_S", 0.0)
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    return tmp_path / "tiny"


async def test_the_first_peer_of_a_network_becomes_ready_alone(tmp_path: Path, tiny: Path) -> None:
    async with Life(peer(tmp_path, model=str(tiny), cache_tokens=256, threads=1, alone=True)) as life:
        unknown = await life.wait_for("reachability_unknown")
        assert gc.get_freeze_count(), "nobody waits while all that was loaded is looked through for garbage"
    assert not gc.get_freeze_count()
    assert life.kinds == ["connected", "loading", "ready", "reachability_unknown", "draining", "stopped"]
    assert "no other node" in str(unknown.fields["reason"])


async def test_outside_its_hours_a_peer_takes_nothing_from_its_owner_until_they_begin(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.serving.owner.LOOK_S", 0.05)
    schedule = hours_without_now()
    (opens, closes), looked_again = schedule.ranges[0], asyncio.Event()

    def minute(_: Owner) -> int:
        if "paused" in life.events:
            looked_again.set()
        return at[0]

    at = [closes]
    monkeypatch.setattr(Owner, "minute", property(minute))
    async with Life(peer(tmp_path, model=str(tiny), cache_tokens=256, threads=1, schedule=schedule)) as life:
        paused = await life.wait_for("paused")
        assert (paused.fields["reason"], life.kinds) == ("schedule", ["connected", "paused"])
        looked_again.clear()
        await looked_again.wait()
        at[0] = opens
        await life.wait_for("ready")
        assert life.kinds[:4] == ["connected", "paused", "loading", "ready"]
        del life.events["paused"]
        at[0] = closes
        await life.wait_for("gave_back")
        at[0] = opens
        await life.wait_for("resumed")
        del life.events["gave_back"]
        at[0] = closes
        await life.wait_for("gave_back")
    told = [kind for kind in life.kinds[4:] if not kind.startswith("reach")]
    assert told == ["paused", "gave_back", "loading", "resumed", "paused", "gave_back", "draining", "stopped"]


async def test_a_peer_that_is_ended_before_its_hours_has_loaded_nothing(tmp_path: Path, tiny: Path) -> None:
    async with Life(peer(tmp_path, model=str(tiny), schedule=hours_without_now())) as life:
        await life.wait_for("paused")
    assert life.kinds == ["connected", "paused", "stopped"]


async def test_what_can_be_refused_is_refused_before_its_hours_begin(tmp_path: Path, tiny: Path) -> None:
    for wrong in ({"model": str(tmp_path / "nothing")}, {"model": str(tiny), "max_memory_bytes": 1}):
        config = peer(tmp_path, **wrong, schedule=hours_without_now())
        with pytest.raises(SwarmError):
            await asyncio.wait_for(run_peer(config, emit=lambda _: None, stop=asyncio.Event()), 60)


async def test_a_peer_whose_hours_end_while_it_loads_announces_itself_as_paused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.serving.owner.LOOK_S", 0.05)
    schedule, announced = hours_without_now(), list[bool]()
    opens, closes = schedule.ranges[0]
    monkeypatch.setattr(Owner, "minute", property(lambda _: closes if "loading" in life.events else opens))

    def serve(self: Presence, *, paused: bool) -> None:
        announced.append(paused)
        serve_presence(self, paused=paused)

    monkeypatch.setattr(Presence, "serve", serve)
    async with Life(peer(tmp_path, model=str(tiny), cache_tokens=256, threads=1, schedule=schedule)) as life:
        await life.wait_for("paused")
        assert announced == [True]
    assert [kind for kind in life.kinds if not kind.startswith("reach")][:4] == [
        "connected",
        "loading",
        "ready",
        "paused",
    ]


async def test_a_peer_measures_itself_at_its_first_start_and_remembers_it(tmp_path: Path, tiny: Path) -> None:
    found = []
    for _ in range(2):
        async with Life(peer(tmp_path, model=str(tiny), blocks=BlockSpans.parse("0:2"), threads=1)) as life:
            found.append((await life.wait_for("ready")).fields)
    first, second = found
    assert (first.pop("probed"), second.pop("probed")) == ("now", "before")
    assert first["token_budget"] == 256, "on a CPU"
    for name in ("decode_ms_per_block", "prefill_ms_per_block", "token_budget", "forward_mib", "probe_disturbed"):
        assert first[name] == second[name]


async def test_weights_are_read_with_no_more_threads_than_are_given(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []

    def noting(*arguments: Any, **options: Any) -> SpanModel:
        seen.append(torch.get_num_threads())
        return load_span(*arguments, **options)

    monkeypatch.setattr(blocks, "load_span", noting)
    given = before + 1
    try:
        async with Life(peer(tmp_path, model=str(tiny), cache_tokens=256, threads=given)) as life:
            await life.wait_for("ready")
    finally:
        torch.set_num_threads(before)
    assert seen == [given]


async def test_by_itself_a_peer_has_no_more_threads_than_its_container_has_time_for(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    load = server.ServerPeer.load

    async def noting(*arguments: Any, **options: Any) -> None:
        seen.append((options["threads"], torch.get_num_threads()))
        await load(*arguments, **options)

    monkeypatch.setattr(server.ServerPeer, "load", noting)
    monkeypatch.setattr("peers.platform.CONTAINER", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    try:
        for threads, given in ((3, None), (1, None), (3, 3)):
            torch.set_num_threads(threads)
            async with Life(peer(tmp_path, model=str(tiny), cache_tokens=256, threads=given)) as life:
                await life.wait_for("ready")
    finally:
        torch.set_num_threads(before)
    assert seen == [(2, 2), (1, 1), (3, 3)]


async def test_a_forward_that_takes_more_than_was_set_aside_leaves_less_cache_from_the_first_start_on(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share in ("JOURNAL_SHARE", "TRAINING_SHARE", "ADAPTER_SHARE", "IN_FLIGHT_SHARE"):
        monkeypatch.setattr(capacity, share, 0.0)  # whose size would depend on the memory that is allowed below
    plan = plan_capacity(FAMILIES["llama"].config(), device="cpu", max_memory_bytes=4 << 30)
    half_bytes = plan.cache_tokens * sum(plan.request.sizes.token_bytes) // 2
    found = replace(PROBE, forward_bytes=FORWARD_BYTES + half_bytes)

    async def measured(engine: Engine, **_: int) -> Probe:
        return found

    loaded: list[weakref.ref[Any]] = []

    def loading(*arguments: Any, **options: Any) -> SpanModel:
        assert not [model for model in loaded if model()], "these weights are not here twice"
        model = load_span(*arguments, **options)
        loaded.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(blocks, "measure", measured)
    monkeypatch.setattr(blocks, "load_span", loading)
    options = {
        "blocks": BlockSpans.of(BlockSpan(0, plan.max_blocks)),
        "max_memory_bytes": plan.share.num_bytes(plan.request, plan.max_blocks),
    }
    for loads in (2, 1):
        loaded.clear()
        async with Life(peer(tmp_path, model=str(tiny), threads=1, **options)) as life:
            cache_tokens = (await life.wait_for("ready")).fields["cache_tokens"]
        assert cache_tokens == plan.cache_tokens // 2 // 16 * 16
        assert len(loaded) == loads


async def test_a_peer_that_nobody_hears_says_so_and_is_ready_only_once_others_have_its_record(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = NodeConfig(network="hive", signing_key=SigningKey.from_seed(bytes(32)))
    bootstrap = await HivemindNode.create(entry)
    (address,) = bootstrap.transport.addresses
    left, settle = asyncio.Event(), server.settle

    async def settled_later(*arguments: Any, **options: Any) -> BlockSpan:
        await left.wait()
        return await settle(*arguments, **options)

    monkeypatch.setattr(server, "settle", settled_later)
    monkeypatch.setattr("peers.serving.joining.SETTLE_S", 0.1)
    config = peer(tmp_path, model=str(tiny), cache_tokens=256, threads=1, initial_peers=(address,))
    async with Life(config) as life:
        await life.wait_for("connected")
        await bootstrap.close()
        left.set()
        lost = await life.wait_for("unannounced")
        assert lost.fields["hint"]
        assert "none can be reached" in str(lost.fields["reason"])
        async with await HivemindNode.create(replace(entry, listen=(address.partition("/p2p/")[0],))) as again:
            links = Links(again.transport, network="hive", software="test")
            DialBackService(links)
            await links.serve()
            await life.wait_for("reachable")
            await life.wait_for("ready")
            await links.close()
    kinds = [kind for kind in life.kinds if not kind.startswith("reach")]
    assert kinds[:5] == ["connected", "loading", "unannounced", "announced", "ready"]


async def test_an_address_at_which_nobody_is_found_is_announced_no_more(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []

    async def watch(
        links: Links, helpers: Sequence[str], tell: Callable[[Verdict], None], withdraw: Callable[..., None]
    ) -> None:
        (address,) = links.transport.addresses
        for withdrawn in ((), (LISTEN,), (address,), ()):
            withdraw(frozenset(withdrawn))
            told.append(server_of.describe().addresses)
        tell(Verdict(reached=(address,)))

    def serve(self: Presence, *, paused: bool) -> None:
        nonlocal server_of
        server_of = self
        served(self, paused=paused)

    server_of: Any = None
    served = Presence.serve
    monkeypatch.setattr(Presence, "serve", serve)
    monkeypatch.setattr(run, "watch_reachability", watch)
    async with Life(peer(tmp_path, model=str(tiny), blocks=BlockSpans.parse("0:1"), threads=1)) as life:
        await life.wait_for("reachable")
    assert [len(addresses) for addresses in told] == [1, 1, 0, 1]


async def test_a_first_join_is_sized_by_a_guess_of_its_speed_and_where_nobody_is_yet_by_memory(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object, **options: object) -> Speed:
        return Speed(1000.0, 100.0)

    monkeypatch.setattr(run, "rough_speed", slow)
    monkeypatch.setattr(server, "LOOK_AROUND_S", 0.0)
    monkeypatch.setattr("peers.serving.joining.SETTLE_S", 0.1)
    options = {"model": str(tiny), "cache_tokens": 256, "threads": 1}
    async with Life(peer(tmp_path, **options, initial_peers=())) as first:
        ready = (await first.wait_for("ready")).fields
        assert ready["span"] == [0, NUM_BLOCKS]
        again = peer(tmp_path, **options, initial_peers=tuple(ready["addresses"]), identity=tmp_path / "other.key")
        monkeypatch.setattr(run, "recall", lambda *args: None)
        monkeypatch.setattr(server, "LOOK_AROUND_S", 30.0)
        async with Life(again) as second:
            span = (await second.wait_for("loading")).fields["span"]
            assert span == [0, 1]
            await second.wait_for("ready")


async def test_a_peer_of_two_devices_is_one_peer(tmp_path: Path, tiny: Path) -> None:
    config = peer(tmp_path, model=str(tiny), device="cpu,cpu", blocks=BlockSpans.parse("0:3"), threads=1)
    async with Life(config) as life:
        ready = (await life.wait_for("ready")).fields
    assert (ready["device"], ready["span"]) == ("cpu,cpu", [0, 3])
