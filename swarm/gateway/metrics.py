"""What the gateway counts, in Prometheus' words. Every application has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peers.exposition import Labels, counter, gauge, step_seconds
from swarm.gateway.engine import Engine
from swarm.gateway.served import Served

PREFIX = "hiveswarm_gateway"
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
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """May wait for the engines' own threads: not in an event loop."""
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
    """Gathers what engines, sessions and the directory hold. From any thread but their own."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = served

    def describe(self) -> list[Metric]:
        return []  # nothing is gathered when this is registered

    def collect(self) -> Iterator[Metric]:
        engines: dict[Labels, Engine] = {(name,): served.engine for name, served in self._served.items()}
        counts = {name: engine.counts() for name, engine in engines.items()}
        traffic = {name: engine.traffic for name, engine in engines.items()}
        coverage = {name: engine.coverage() for name, engine in engines.items()}

        def gauges(name: str, text: str, field: str) -> Metric:
            values = {model: getattr(of, field) for model, of in counts.items()}
            return gauge(f"{PREFIX}_{name}", text, values, "model")

        def counters(name: str, text: str, field: str) -> Metric:
            values = {model: getattr(of, field) for model, of in counts.items()}
            return counter(f"{PREFIX}_{name}", text, values, "model")

        def sums(name: str, text: str, field: str) -> Metric:
            values = {model: getattr(of, field) for model, of in traffic.items()}
            return counter(f"hiveswarm_session_{name}", text, values, "model")

        yield gauges("active_answers", "Answers under way.", "active")
        yield gauges("waiting_answers", "Answers that wait for a reader who is behind.", "waiting")
        yield gauges("kept_sessions", "Sessions kept at peers between turns.", "kept_sessions")
        yield gauges("kept_tokens", "Tokens that those hold.", "kept_tokens")
        yield counters("generated_tokens", "Tokens generated.", "generated_tokens")
        yield counters("cached_tokens", "Tokens of prompts that kept sessions held already.", "cached_tokens")
        yield counters("head_batches", "Products of the model's head, each for one answer or more.", "products")
        yield gauge(
            f"{PREFIX}_missing_blocks",
            "Blocks of the model that no peer serves now.",
            {model: sum(map(len, of.gaps)) if of else self._blocks(model) for model, of in coverage.items()},
            "model",
        )
        yield gauge(
            f"{PREFIX}_replication",
            "Peers that hold the model's rarest block.",
            {model: of.replication if of else 0 for model, of in coverage.items()},
            "model",
        )
        yield sums("steps", "Steps sent to peers.", "steps")
        yield sums("results", "Steps answered.", "results")
        yield sums("failovers", "Sessions moved to another route.", "rebuilds")
        yield sums("replays", "Steps sent again from afar.", "replays")
        yield sums("replayed_tokens", "Positions that a peer sent again from its journal.", "replayed_positions")
        yield sums("relays", "Outputs carried between two peers that could not reach each other.", "relays")
        yield sums("sent_bytes", "Of steps.", "bytes_sent")
        yield sums("received_bytes", "Of results.", "bytes_received")
        yield counter(
            "hiveswarm_session_rpc_errors",
            "What peers declined, by code; lost: peers that failed.",
            {(*model, code): count for model, of in traffic.items() for code, count in list(of.failures.items())},
            "model",
            "code",
        )
        times = {model: of.step_s for model, of in traffic.items()}
        yield step_seconds("hiveswarm_session_step_seconds", "Where the time of steps went.", times, "model")

    def _blocks(self, model: Labels) -> int:
        return self._served[model[0]].num_blocks
