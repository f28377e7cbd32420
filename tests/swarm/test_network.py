"""The network's thread, as other threads see it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from peers.transport.memory import MemoryNetwork
from routing.errors import NoRoute
from swarm.network import ClientNode, NetworkThread
from tests.helpers.memory_swarm import MemoryNode, new_key


@pytest.fixture
def network() -> Iterator[NetworkThread]:
    async def make() -> ClientNode:
        return ClientNode(MemoryNode(MemoryNetwork(), new_key(), client_mode=True), network="test")

    network = NetworkThread(make)
    yield network
    network.close()


class Endless:
    """Work that ends when it is cancelled."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), threading.Event()

    async def run(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


def test_who_calls_gets_the_result_or_the_error(network: NetworkThread) -> None:
    async def fails() -> NoReturn:
        raise NoRoute("nobody is there")

    async def thread() -> str:
        return threading.current_thread().name

    assert network.call(thread()) == "swarm network"
    with pytest.raises(NoRoute, match="nobody"):
        network.call(fails())


def test_work_that_takes_too_long_is_cancelled(network: NetworkThread) -> None:
    work = Endless()
    with pytest.raises(TimeoutError):
        network.call(work.run(), timeout_s=0.01)
    assert work.begun.wait(60)
    assert work.cancelled.wait(60)


def test_an_interrupted_call_cancels_its_work(network: NetworkThread, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Endless()

    def interrupted(*_: object) -> NoReturn:
        assert work.begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr("swarm.network.Answer.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        network.call(work.run())
    assert work.cancelled.wait(60)
    monkeypatch.undo()


def test_who_waits_when_the_network_ends_waits_no_more(network: NetworkThread) -> None:
    work, caught = Endless(), list[BaseException]()

    def call() -> None:
        try:
            network.call(work.run())
        except concurrent.futures.CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert work.begun.wait(60)
    network.close()
    thread.join(60)
    assert len(caught) == 1
