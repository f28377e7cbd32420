"""What the gateway counts, in Prometheus' words. Every application has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.gateway.served import Served

PREFIX = "swarm_gateway"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of the requests, and those that the engines and sessions keep themselves, read when asked for."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(f"{PREFIX}_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.first_token_s = Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "From when an answer is begun to its first piece.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answer_s = Histogram(
            f"{PREFIX}_request_duration_seconds",
            "From when an answer is begun to its end.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.disconnects = Counter(
            f"{PREFIX}_disconnects", "Readers that left before their answer's end.", registry=self.registry
        )
        self.registry.register(_Engines(served))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts answers by the path's pattern, of which there are few, and status."""

    def __init__(self, app: ASGIApp, *, requests: Counter) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


class _Engines(Collector):
    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "active": GaugeMetricFamily(f"{PREFIX}_active_answers", "Answers under way.", labels=["model"]),
            "waiting": GaugeMetricFamily(
                f"{PREFIX}_waiting_answers", "Answers that wait for a reader who is behind.", labels=["model"]
            ),
            "kept_sessions": GaugeMetricFamily(
                f"{PREFIX}_kept_sessions", "Sessions kept at peers between turns.", labels=["model"]
            ),
            "kept_tokens": GaugeMetricFamily(f"{PREFIX}_kept_tokens", "Tokens that those hold.", labels=["model"]),
        }
        counters = {
            "generated_tokens": CounterMetricFamily(
                f"{PREFIX}_generated_tokens", "Tokens generated.", labels=["model"]
            ),
            "cached_tokens": CounterMetricFamily(
                f"{PREFIX}_cached_tokens", "Tokens of prompts that kept sessions held already.", labels=["model"]
            ),
            "products": CounterMetricFamily(
                f"{PREFIX}_head_batches", "Products of the model's head, each for one answer or more.", labels=["model"]
            ),
        }
        traffic = {
            "steps": CounterMetricFamily("swarm_session_steps", "Steps sent to peers.", labels=["model"]),
            "rebuilds": CounterMetricFamily(
                "swarm_session_failovers", "Sessions moved to another route.", labels=["model"]
            ),
            "replays": CounterMetricFamily("swarm_session_replays", "Steps sent again from afar.", labels=["model"]),
            "bytes_sent": CounterMetricFamily("swarm_session_sent_bytes", "Bytes of steps.", labels=["model"]),
            "bytes_received": CounterMetricFamily(
                "swarm_session_received_bytes", "Bytes of results.", labels=["model"]
            ),
        }
        for name, served in self._served.items():
            counts, sent = served.engine.counts(), served.engine.traffic
            for field, metric in (gauges | counters).items():
                metric.add_metric([name], getattr(counts, field))
            for field, metric in traffic.items():
                metric.add_metric([name], getattr(sent, field))
        yield from (gauges | counters | traffic).values()
