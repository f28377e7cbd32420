"""The view in Prometheus' words, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm.dashboard.core import Core
from swarm.dashboard.schemas import State

PREFIX = "hiveswarm_dashboard"


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
        labels = ["model", "model_id"]
        peers = GaugeMetricFamily(f"{PREFIX}_peers", "Peers by state.", labels=[*labels, "state"])
        gauges = {
            "replication": GaugeMetricFamily(
                f"{PREFIX}_replication", "Holders of the model's rarest block.", labels=labels
            ),
            "gaps": GaugeMetricFamily(f"{PREFIX}_missing_blocks", "Blocks that nobody serves.", labels=labels),
            "sessions": GaugeMetricFamily(f"{PREFIX}_sessions", "Sessions held at peers.", labels=labels),
            "total": GaugeMetricFamily(
                f"{PREFIX}_capacity_tokens_per_second", "Of all users, by maximum flow.", labels=labels
            ),
            "stream": GaugeMetricFamily(
                f"{PREFIX}_stream_tokens_per_second", "Of one user here, by the best route.", labels=labels
            ),
        }
        for view in self._core.models:
            of = [view.name, view.model_id[:12]]
            for state in State:
                peers.add_metric([*of, state.value], view.states[state])
            gauges["replication"].add_metric(of, view.replication)
            gauges["gaps"].add_metric(of, sum(end - start for start, end in view.gaps))
            gauges["sessions"].add_metric(of, view.sessions)
            gauges["total"].add_metric(of, view.total_tokens_per_s)
            if view.stream_tokens_per_s is not None:
                gauges["stream"].add_metric(of, view.stream_tokens_per_s)
        calls = CounterMetricFamily(f"{PREFIX}_calls", "Calls of peers, by outcome.", labels=["outcome"])
        for outcome, count in self._calls.items():
            calls.add_metric([outcome], count)
        read = GaugeMetricFamily(f"{PREFIX}_index_read_timestamp_seconds", "When the network's index was read last.")
        read.add_metric([], self._core.read_at_s or 0.0)
        events = CounterMetricFamily(f"{PREFIX}_events", "What happened to peers and blocks.")
        events.add_metric([], self._core.total_events)
        yield from (peers, *gauges.values(), calls, read, events)
