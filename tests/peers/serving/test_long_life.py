"""A hop of real blocks through a long life: whatever clients do, nothing of it is left when they have gone."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from peers.runtime.engine import Engine
from peers.runtime.works import EngineConfig
from peers.serving.admission import Admission, AdmissionLimits
from peers.serving.handler import Handler, Served
from peers.serving.ledger import Ledger, LedgerLimits
from peers.serving.push import Delivery
from peers.transport.links import Link, Links
from peers.transport.memory import MemoryNetwork
from peers.wire import tensors
from peers.wire.messages import Close, Code, Failed, Open, Opened, Replay, Step
from routing.ids import BlockSpan, BlockSpans
from tests.peers.runtime.spans import Local, assert_pages_add_up, new_session, random_ids
from tests.peers.serving.hops import MODEL, peer_id

SPAN = BlockSpan(1, 3)
LENGTH_MAX = 140
KEYS = [b"0" * 16, b"1" * 16]
CLIENTS = 8
OPERATIONS = int(os.environ.get("OPERATIONS", "20000"))
"""So many take ten seconds."""
GROWN_BYTES_MAX = 20_000_000
"""Since a tenth of the operations were done: by then everything that is allocated once has been."""


class Hop:
    """Blocks, the hop behind them, which only notes what comes, and all clients' answers."""

    def __init__(self, network: MemoryNetwork) -> None:
        local = Local("llama", SPAN)
        self.rows, _ = local.follow([random_ids(80, seed=0)])
        self.engine = Engine(local.cut(), EngineConfig(cache_tokens=640, page_size=4, token_budget=128))
        self.transport, behind = network.transport(peer_id(100)), network.transport(peer_id(101))
        self.links, self.behind = (Links(each, network="test", software="test") for each in (self.transport, behind))
        self.behind.handle_at_once(Step, lambda _, step, __: self.answer(step.session, step.step, step))
        self.admission = Admission(AdmissionLimits())
        self.waiting: dict[tuple[bytes, int | None], asyncio.Future[Any]] = {}
        """By session and step, of clients that wait for an answer."""

    async def start(self) -> None:
        for links in (self.links, self.behind):
            await links.serve()
        await self.engine.start()
        self.ledger: Ledger[Delivery, Link] = Ledger(
            LedgerLimits(
                max_positions=LENGTH_MAX,
                pool_positions=self.engine.stats().total_tokens,
                weight=self.engine.weight,
                free_positions=lambda: self.engine.stats().free_tokens,
                expected_positions=30,
            )
        )
        self.handler = Handler(
            links=self.links,
            engine=self.engine,
            served=Served(model=MODEL, spans=BlockSpans.of(SPAN), hidden_size=self.engine.model.hidden_size),
            ledger=self.ledger,
            admission=self.admission,
        )
        self.running = asyncio.create_task(self.handler.run())

    def client(self, network: MemoryNetwork, number: int) -> Links:
        links = Links(network.transport(peer_id(number), client_mode=True), network="test", software="test")
        links.handle_at_once(Opened, lambda _, opened, __: self.answer(opened.session, None, opened))
        links.handle_at_once(Failed, lambda _, failed, __: self.answer(failed.session, failed.step, failed))
        return links

    def answer(self, session: bytes, step: int | None, answer: Any) -> None:
        future = self.waiting.pop((session, step), None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def ask(self, link: Link, message: Any, payload: bytes | memoryview = b"") -> Any:
        """What came of it."""
        answered = self.waiting[message.session, getattr(message, "step", None)] = asyncio.Future()
        await link.send(message, payload)
        async with asyncio.timeout(60):
            return await answered

    def assert_nothing_is_left(self) -> None:
        """But for prefixes, which count as free and pay for themselves in the journal."""
        handler, ledger, journal, engine = self.handler, self.ledger, self.handler.journal, self.engine
        prefixes = {part.chunk: len(part.chunk.payload) for _, parts in journal._blocks.values() for part in parts}
        stats = engine.stats()
        left = {
            "clients that wait": self.waiting,
            "sessions in the ledger": [*ledger.entries(), *ledger._places_of, *ledger.standbys],
            "answers": ledger._answers_bytes,
            "promises": ledger.owed(0.0),
            "sessions in the journal": len(journal),
            "bytes in the journal": sum(journal.memory_bytes.values()) - sum(prefixes.values()),
            "bytes in flight": [each for each in self.admission.accounts.values() if not each.idle],
            "of the handler": [*handler._works._counts, *handler._works._last, *handler._replays, *handler._telling],
            "tasks": [*handler._tracing, *handler._repeating, *handler._steps._tasks],
            "sessions in the engine": [
                *engine._sessions,
                *engine._by_number,
                *engine._running,
                *engine._pages.sessions,
            ],
            "offers of prefixes": engine._prefixes._offers,
            "works": [*engine._tickets, *engine._scheduler._entries, *engine._scheduler._lines],
            "positions in the queue": engine._scheduler.queued_tokens,
            "positions": stats.total_tokens - stats.free_tokens,
        }
        assert {what: each for what, each in left.items() if each} == {}
        assert_pages_add_up(engine)

    async def close(self) -> None:
        assert not self.running.done(), "something failed that nobody expected to"
        self.running.cancel()
        await asyncio.wait([self.running])
        for links in (self.links, self.behind):
            await links.close()
            await links.transport.close()
        await self.engine.stop()


async def live(hop: Hop, links: Links, rng: random.Random, note: Callable[[], bool], seen: Counter[str]) -> None:
    """One session after another, until `note` says that it was long enough: prompts and tokens, some of them taken
    back, cancelled or in forks, over new routes, and sent downstream again."""
    link = await links.to(hop.transport.peer_id, hop.transport.addresses)
    place: dict[str, Any] = {"block": SPAN.start, "dtype": "float32", "hidden": hop.rows.shape[1]}
    session, epoch, held, step = b"", 0, 0, 0

    async def open_route(keep: int = 0) -> int:
        """Positions that the session goes on with."""
        opened = await hop.ask(
            link,
            Open(
                session=session,
                epoch=epoch,
                model=MODEL.digest,
                start=SPAN.start,
                end=SPAN.end,
                previous=None,
                next=hop.behind.transport.peer_id,
                next_addresses=hop.behind.transport.addresses,
                prefix=tuple(KEYS[: rng.randint(0, 2)]),
                keep=keep,
            ),
        )
        if isinstance(opened, Failed):
            return -1
        seen["on another route" if keep else "behind a prefix"] += opened.held > 0
        return int(opened.held)

    while note():
        if not session:
            session, epoch, step = new_session().raw, 1, 0
            held = await open_route()
            if held < 0:
                session = b""  # no room for another one now
            continue
        tokens, dice = rng.choice([1, 1, 1, 1, 1, 1, 5, 20, 80]), rng.random()
        step += 1
        asked = Step(session=session, epoch=epoch, step=step, first=held, count=tokens, want_from=tokens, **place)
        if dice < 0.05 or held + tokens > LENGTH_MAX:
            await link.send(Close(sessions=(session,)))
            session = b""
            continue
        if dice < 0.1 and held:
            asked = replace(asked, session=new_session().raw, parent=session)
        elif dice < 0.2:
            asked = replace(asked, first=max(0, held - rng.randint(1, 4)))
        elif dice < 0.22:
            epoch += 1
            held = await open_route(rng.choice([0, held]))
            session = session if held >= 0 else b""
            continue
        elif dice < 0.24 and held:
            asked = Replay(session=session, block=SPAN.start, epoch=epoch, step=step, first=0, count=held, want_from=0)
        payload = b"" if isinstance(asked, Replay) else tensors.pack(hop.rows[:tokens], "float32")
        if dice > 0.95:  # and gone before it is answered
            seen["not waited for"] += 1
            await link.send(asked, payload)
            await link.send(Close(sessions=(session,)))
            session = b""
            continue
        answer = await hop.ask(link, asked, payload)
        seen[answer.code if isinstance(answer, Failed) else asked.__struct_config__.tag] += 1
        if asked.session != session:
            seen["a fork"] += 1
            await link.send(Close(sessions=(session,)))
            session = asked.session
        if isinstance(answer, Failed):
            await link.send(Close(sessions=(session,)))
            session = b""
        elif isinstance(asked, Step):
            held = asked.first + asked.count


@pytest.mark.timeout(600)
async def test_a_long_life_leaves_no_page_no_session_no_promise_and_no_memory() -> None:
    """Clients go without a word."""
    network, rng, seen = MemoryNetwork(), random.Random(0), Counter[str]()
    hop, left, resident_bytes = Hop(network), OPERATIONS, list[int]()
    await hop.start()

    def note() -> bool:
        nonlocal left
        left -= 1
        if left % (OPERATIONS // 10) == 0:
            gc.collect()
            resident_bytes.append(psutil.Process().memory_info().rss)
        return left > 0

    clients = [hop.client(network, number) for number in range(1, CLIENTS + 1)]
    await asyncio.gather(*(live(hop, links, rng, note, seen) for links in clients))
    for links in clients:
        await links.close()
        await links.transport.close()
    await hop.handler.drain(timeout_s=60)
    hop.assert_nothing_is_left()
    await hop.close()
    assert (+seen).keys() >= {
        "step",
        "replay",
        "a fork",
        "behind a prefix",
        "on another route",
        "not waited for",
        Code.PREEMPTED,
    }
    assert resident_bytes[-1] - resident_bytes[0] < GROWN_BYTES_MAX, resident_bytes
