"""Eight threads that generate through three peers, on a virtual clock: what it brings that callers wait for each other.

A token is some Python before the head and some behind it, one thread at a time; a product of the head; and a forward at
each of three peers, whoever is in them. Peers and head take whatever waits. Either all of them share two cores, as on
one machine, or each has a machine of its own, where it pays to be at different places at the same time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from swarm.session.callers import Callers
from swarm.session.driver import SHARED

PEERS = 3
LENGTH_S = 5.0
Event = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class World:
    """Seconds: what a forward, or a product, takes whoever is in it, and what for each row; a way to the next peer."""

    callers: int = 8
    cores: int | None = 2
    """That all share; None: everybody computes on a machine of his own."""
    forward_s: float = 0.0044
    forward_row_s: float = 0.0005
    head_s: float = 0.010
    head_row_s: float = 0.0002
    before_head_s: float = 0.0005
    behind_head_s: float = 0.001
    trip_s: float = 0.0003


class Simulation:
    def __init__(self, world: World, seed: int, *, waits: bool) -> None:
        self.world, self.waits = world, waits
        self.now_s, self.tokens = 0.0, 0
        self.callers = Callers()
        self.head = Head(self)
        self.departures = Departures(self)
        self.peers = [Peer(self, number) for number in range(PEERS)]
        self._rng = random.Random(seed)
        self._order = itertools.count()
        self._later: list[tuple[float, int, Event]] = []
        self._running: list[list[float | Event]] = []
        """Seconds left, and what follows."""
        self._python: list[tuple[float, Event]] = []
        self._python_runs = False

    def tokens_per_s(self) -> float:
        for caller in range(self.world.callers):
            self.later(0.03 * self._rng.random(), lambda caller=caller: self.peers[0].arrive([caller]))
        while self.now_s < LENGTH_S:
            cores = self.world.cores or len(self._running)
            speed = min(1.0, cores / len(self._running)) if self._running else 1.0
            ends_s = min((left / speed for left, _ in self._running), default=float("inf"))
            event_s = self._later[0][0] - self.now_s if self._later else float("inf")
            step_s = max(0.0, min(ends_s, event_s))
            self.now_s += step_s
            for work in self._running:
                work[0] -= step_s * speed
            if event_s <= ends_s:
                heapq.heappop(self._later)[2]()
            else:
                ended = [work for work in self._running if work[0] <= 1e-12]
                self._running = [work for work in self._running if work[0] > 1e-12]
                for _, follows in ended:
                    follows()
        return self.tokens / self.now_s

    def later(self, delay_s: float, event: Event) -> None:
        heapq.heappush(self._later, (self.now_s + delay_s, next(self._order), event))

    def compute(self, seconds: float, follows: Event) -> None:
        self._running.append([seconds, follows])

    def python(self, seconds: float, follows: Event) -> None:
        """In one thread at a time, whichever gets the interpreter's lock; now and then the machine is busy."""
        late_s = self._rng.expovariate(200.0) if self._rng.random() < 0.02 else 0.0
        self._python.append((seconds * self._rng.uniform(0.8, 1.2) + late_s, follows))
        self._run_python()

    def _run_python(self) -> None:
        if not self._python or self._python_runs:
            return
        self._python_runs = True
        seconds, follows = self._python.pop(self._rng.randrange(len(self._python)))

        def ended() -> None:
            self._python_runs = False
            follows()
            self._run_python()

        self.compute(seconds, ended)


class Gathering:
    """Callers who are ready, and wait for others as long as `Callers` says."""

    to_head = False

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.ready: list[int] = []
        self.until_s = 0.0
        self._looks = 0

    def gain_s(self) -> float:
        raise NotImplementedError

    def go(self, callers: list[int]) -> None:
        raise NotImplementedError

    def look(self) -> None:
        simulation, self._looks = self.simulation, self._looks + 1
        wait_s = 0.0
        if simulation.waits:
            wait_s = simulation.callers.patience_s(
                len(self.ready), self.gain_s(), simulation.now_s, to_head=self.to_head
            )
        wait_s = min(wait_s, self.until_s - simulation.now_s)
        if wait_s > 0:
            simulation.later(wait_s, lambda look=self._looks: self.flush() if look == self._looks else None)
        else:
            self.flush()

    def flush(self) -> None:
        self._looks += 1
        ready, self.ready = self.ready, []
        self.go(ready)


class Head(Gathering):
    to_head = True

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._product_s = simulation.world.head_s
        self._busy = False

    def gain_s(self) -> float:
        return self._product_s

    def came(self, caller: int) -> None:
        self.simulation.callers.came_to_head(caller)
        self.ready.append(caller)
        if not self._busy:
            if len(self.ready) == 1:
                self.until_s = self.simulation.now_s + self._product_s
            self.look()

    def go(self, callers: list[int]) -> None:
        simulation, world, began_s = self.simulation, self.simulation.world, self.simulation.now_s
        self._busy = True

        def ended() -> None:
            self._busy = False
            self._product_s += 0.2 * (simulation.now_s - began_s - self._product_s)
            for caller in callers:
                simulation.python(world.behind_head_s, lambda caller=caller: simulation.departures.came(caller))
            if self.ready:
                self.until_s = simulation.now_s + self._product_s
                self.look()

        simulation.compute(world.head_s + world.head_row_s * len(callers), ended)


class Departures(Gathering):
    def gain_s(self) -> float:
        return SHARED * max(peer.took_s for peer in self.simulation.peers)

    def came(self, caller: int) -> None:
        self.simulation.callers.asked(caller, self.simulation.now_s)
        if not self.ready:
            self.until_s = self.simulation.now_s + self.gain_s()
        self.ready.append(caller)
        self.look()

    def go(self, callers: list[int]) -> None:
        self.simulation.later(self.simulation.world.trip_s, lambda: self.simulation.peers[0].arrive(callers))


class Peer:
    def __init__(self, simulation: Simulation, number: int) -> None:
        self.took_s = 0.0
        self._simulation = simulation
        self._number = number
        self._waiting: list[int] = []
        self._busy = False

    def arrive(self, callers: list[int]) -> None:
        self._waiting += callers
        if not self._busy:
            self._forward()

    def _forward(self) -> None:
        simulation, world = self._simulation, self._simulation.world
        batch, self._waiting, self._busy = self._waiting, [], True
        began_s = simulation.now_s

        def ended() -> None:
            self.took_s, self._busy = simulation.now_s - began_s, False
            last = self._number + 1 == PEERS
            follows = self._answer if last else simulation.peers[self._number + 1].arrive
            simulation.later(world.trip_s, lambda: follows(batch))
            if self._waiting:
                self._forward()

        simulation.compute(world.forward_s + world.forward_row_s * len(batch), ended)

    def _answer(self, callers: list[int]) -> None:
        simulation = self._simulation
        simulation.tokens += len(callers)
        for caller in callers:
            simulation.callers.answered(caller, simulation.now_s)
        for caller in callers:
            simulation.python(simulation.world.before_head_s, lambda caller=caller: simulation.head.came(caller))


def gain(world: World) -> float:
    """Tokens per second, as a multiple of those without waiting."""
    waiting, taking = (
        sum(Simulation(world, seed, waits=waits).tokens_per_s() for seed in range(3)) for waits in (True, False)
    )
    return waiting / taking


@pytest.mark.parametrize(
    ("world", "least"),
    [
        (World(), 1.4),
        (World(callers=4), 1.25),
        (World(callers=16), 1.2),
        (World(forward_s=0.0025, forward_row_s=0.0003, head_s=0.005), 1.25),
        (World(forward_s=0.010, forward_row_s=0.002, head_s=0.020, before_head_s=0.001, behind_head_s=0.002), 1.3),
    ],
)
def test_on_shared_cores_callers_that_wait_for_each_other_get_more_tokens(world: World, least: float) -> None:
    assert gain(world) > least


@pytest.mark.parametrize(
    "world",
    [
        World(cores=None),
        World(cores=None, callers=16),
        World(cores=None, trip_s=0.02),
        World(cores=None, forward_s=0.010, forward_row_s=0.002),
        World(cores=None, forward_s=0.030, forward_row_s=0.001),
        World(cores=None, callers=2),
        World(cores=2, callers=2),
    ],
)
def test_with_machines_of_their_own_and_among_two_waiting_costs_next_to_nothing(world: World) -> None:
    assert gain(world) > 0.95


def test_one_caller_never_waits() -> None:
    assert gain(World(callers=1)) == 1.0
