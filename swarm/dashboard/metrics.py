"""The view in Prometheus' words, made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from peers.exposition import Labels, by_label, counter, gauge
from swarm.dashboard.core import Core
from swarm.dashboard.schemas import ModelView, State

PREFIX = "hiveswarm_dashboard"
LABELS = ("model", "model_id")


class CoreMetrics(Collector):
    """Models are labelled by name and the beginning of their id: names are claims, and not unique."""

    def __init__(self, core: Core, calls: Mapping[str, int]) -> None:
        self._core = core
        self._calls = calls

    def text(self) -> bytes:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        models: dict[Labels, ModelView] = {(view.name, view.model_id[:12]): view for view in self._core.models}

        def of_models(name: str, text: str, read: Callable[[ModelView], float | None]) -> Metric:
            values = {labels: value for labels, view in models.items() if (value := read(view)) is not None}
            return gauge(f"{PREFIX}_{name}", text, values, *LABELS)

        yield gauge(
            f"{PREFIX}_peers",
            "Peers by state.",
            {(*labels, state.value): view.states[state] for labels, view in models.items() for state in State},
            *LABELS,
            "state",
        )
        yield of_models("replication", "Holders of the model's rarest block.", lambda view: view.replication)
        yield of_models(
            "missing_blocks", "Blocks that nobody serves.", lambda view: sum(end - start for start, end in view.gaps)
        )
        yield of_models("sessions", "Sessions held at peers.", lambda view: view.sessions)
        yield of_models(
            "capacity_tokens_per_second", "Of all users, by maximum flow.", lambda view: view.total_tokens_per_s
        )
        yield of_models(
            "stream_tokens_per_second", "Of one user here, by the best route.", lambda view: view.stream_tokens_per_s
        )
        yield counter(f"{PREFIX}_calls", "Calls of peers, by outcome.", by_label(self._calls), "outcome")
        yield gauge(
            f"{PREFIX}_index_read_timestamp_seconds",
            "When the network's index was read last.",
            {(): self._core.read_at_s or 0.0},
        )
        yield counter(f"{PREFIX}_events", "What happened to peers and blocks.", {(): self._core.total_events})
