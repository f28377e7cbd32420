"""Counts in Prometheus' words, and a small server that tells them.

Owns the making of metric families from plain numbers, and HTTP on a port of its own for programs that have no other
server. Knows nothing of what is counted.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from peers.errors import AddressInUse
from peers.tally import StepTimes, Tally

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0
"""Who connects and then says nothing is left after so long."""
POLL_S = 0.25
"""How often the server looks whether it is to end."""

Labels = tuple[str, ...]


def gauge(name: str, text: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    """`values`: by the values of `labels`."""
    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counter(name: str, text: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def histogram(name: str, text: str, values: Mapping[Labels, Tally], *labels: str) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for label_values, tally in values.items():
        family.add_metric(label_values, tally.buckets(), tally.sum)
    return family


def step_seconds(name: str, text: str, values: Mapping[Labels, StepTimes], *labels: str) -> Metric:
    """With two labels more: `kind` (decode, prefill) and `phase`."""
    tallies = {
        (*label_values, kind, phase): tally
        for label_values, times in values.items()
        for kind, of_kind in times.by_kind.items()
        for phase, tally in zip(times.phases, of_kind, strict=True)
    }
    return histogram(name, text, tallies, *labels, "kind", "phase")


def by_label(values: Mapping[str, float]) -> dict[Labels, float]:
    return {(label,): value for label, value in values.items()}


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[Labels, float]) -> Metric:
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, text: str, *arguments: object) -> None:
        logger.debug(text, *arguments)


class _Server(WSGIServer):
    timeout = POLL_S

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without the base's look-up of this machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(cast(tuple[str, int], self.server_address))
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("a request for metrics failed", exc_info=True)


@contextmanager
def told(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Within, `registry` is told at the address that this yields. Raises AddressInUse.

    One thread takes one request at a time: strangers who reach the port can keep others from it, and cost no more. Nor
    does the end wait for one of them.
    """
    try:
        server = _Server(host, port)
    except (OSError, TypeError) as error:  # the latter of what cannot be a host's name at all
        why = error.strerror if isinstance(error, OSError) else "that is no host"
        raise AddressInUse(
            f"metrics cannot be told on {host} port {port}: {why}",
            hint="choose another --metrics-port or --metrics-host",
        ) from error
    server.set_app(make_wsgi_app(registry))
    ending = threading.Event()

    def serve() -> None:
        while not ending.is_set():
            server.handle_request()

    thread = threading.Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{server.server_name}]" if ":" in host else server.server_name
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        ending.set()
        thread.join(2 * POLL_S)
        server.server_close()
