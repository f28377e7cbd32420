"""What a node is told when it starts. What no node can do is refused here, before anything takes time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peers.model.quantization import NONE
from peers.runtime.works import Sharing
from peers.serving.comfort import Schedule
from peers.serving.owner import check as check_comfort
from routing.errors import CallerError
from routing.ids import BlockSpans
from routing.records import MAX_ADAPTERS, check_adapter_name, check_network, check_peer_name


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """What every node is told. Raises CallerError on a bad network name."""

    network: str
    identity: Path
    listen: tuple[str, ...] = ()
    """Multiaddrs; empty: all interfaces, on the port used last time."""
    announce: tuple[str, ...] = ()
    """Addresses that others reach this node by, where they differ from those it listens on."""
    initial_peers: tuple[str, ...] = ()
    """Nodes of the network to join through; empty: this one begins a network."""

    def __post_init__(self) -> None:
        check_network(self.network)


class BootstrapConfig(NodeOptions):
    """A DHT entry node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig(NodeOptions):
    """A server peer. Raises CallerError also on a name that no record can carry."""

    model: str
    blocks: BlockSpans | None = None
    num_blocks: int | None = None
    """With neither `blocks` nor `num_blocks`, as many as memory holds, where they are missing most."""
    dtype: str = "auto"
    quantization: str = NONE
    """Of the weights; see `peers.model.quantization`. Activations stay in `dtype`."""
    device: str = "auto"
    name: str = ""
    """What others see beside the peer id."""
    alone: bool = False
    """This process is for nothing else: collections of garbage pass by what it has loaded (`peers.garbage`)."""
    max_memory_bytes: int | None = None
    threads: int | None = None
    """None: torch's choice, but no more than the container that this process may run in has time for."""
    cache_tokens: int | None = None
    nice: int | None = None
    """Priority of this process, 0 (usual) to 19 (only what others leave)."""
    schedule: Schedule | None = None
    """When to serve, in local time; None: always."""
    pause_on_load_percent: float | None = None
    """Of all CPUs together, or of a GPU that is served on: step back while other programs use so much."""
    max_bytes_per_s: int | None = None
    """Each way, for all that links carry."""
    journal_disk_bytes: int = 0
    """Of the cache folder's disk, for what sessions sent downstream and memory has no room for."""
    share_prefixes: Sharing = "owner"
    """Whose sessions may begin with what another one computed: see `EngineConfig`."""
    training: bool = True
    """Compute gradients, too, for clients that fine-tune adapters of their own."""
    adapters: tuple[tuple[str, str], ...] = ()
    """To host for whoever asks for them: a name, and a folder or hub id."""
    token: str | None = None
    """Access token of the model hub."""
    stay: bool = False
    """Serve what was chosen at the start, also when other blocks need this peer more; with `blocks` it always does."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    """Where Prometheus may ask, without a key; None: nowhere, 0: any port that is free."""

    def __post_init__(self) -> None:
        NodeOptions.__post_init__(self)
        check_peer_name(self.name)
        if self.threads is not None and self.threads < 1:
            raise ValueError("threads is at least 1")
        names = [check_adapter_name(name) for name, _ in self.adapters]
        if len(names) > MAX_ADAPTERS or len(set(names)) < len(names):
            raise CallerError(
                f"a peer hosts up to {MAX_ADAPTERS} adapters, each under a name of its own",
                hint="leave some out, or rename them in --adapter NAME=FOLDER",
            )
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise ValueError(f"{self.metrics_port} is no port")
        check_comfort(nice=self.nice, load_percent=self.pause_on_load_percent, max_bytes_per_s=self.max_bytes_per_s)
