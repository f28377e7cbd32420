from __future__ import annotations

import socket
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from peers.errors import AddressInUse
from peers.exposition import gauge, step_seconds, told
from peers.tally import StepTimes, Tally


class Fixed(Collector):
    def __init__(self, *metrics):
        self._metrics = metrics

    def collect(self):
        return self._metrics


@given(st.lists(st.lists(st.floats(0, 100)), min_size=1, max_size=3))
def test_a_tally_counts_each_value_once_and_tallies_add_up(groups: list[list[float]]) -> None:
    tallies = []
    for values in groups:
        tallies.append(Tally((1, 2.5, 10)))
        for value in values:
            tallies[-1].add(value)
    flat = [value for values in groups for value in values]
    expected = [sum(value <= bound for value in flat) for bound in (1, 2.5, 10, float("inf"))]
    whole = Tally.of(tallies)
    assert whole.buckets() == list(zip(["1", "2.5", "10", "+Inf"], expected, strict=True))
    assert whole.sum == pytest.approx(sum(flat))


def test_a_host_that_can_be_none_is_named() -> None:
    with (
        pytest.raises(AddressInUse, match=r"on ü\.\.b port 0: that is no host"),
        told(CollectorRegistry(), "ü..b", 0),
    ):
        pass


def test_what_is_told_is_read_back_and_the_port_is_free_afterwards() -> None:
    times = StepTimes(("queue", "compute"))
    times.add(1, 0.001, 0.02)
    times.add(200, 0.5, 3.0)
    registry = CollectorRegistry()
    registry.register(Fixed(gauge("a_gauge", "x", {("b",): 2}, "l"), step_seconds("a_seconds", "x", {(): times})))
    with told(registry, "127.0.0.1", 0) as url:
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode()
        port = int(url.split(":")[2].partition("/")[0])
        with pytest.raises(AddressInUse, match="metrics"), told(registry, "127.0.0.1", port):
            pass
    with socket.create_server(("127.0.0.1", port)):
        pass
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["a_gauge", ("l", "b")] == 2
    prefill, decode = ("kind", "prefill"), ("kind", "decode")
    assert samples["a_seconds_sum", prefill, ("phase", "compute")] == 3.0
    assert samples["a_seconds_bucket", decode, ("le", "0.001"), ("phase", "queue")] == 1


def test_a_request_that_does_not_end_does_not_keep_the_server_from_ending() -> None:
    with told(CollectorRegistry(), "127.0.0.1", 0) as url:
        port = int(url.split(":")[2].partition("/")[0])
        silent = socket.create_connection(("127.0.0.1", port))
        silent.sendall(b"GET /metrics HTTP/1.1\r\n")
    with silent, socket.create_server(("127.0.0.1", port)):
        pass
