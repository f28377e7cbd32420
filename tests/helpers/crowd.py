"""A thousand simulated peers behind the dashboard's real application: hostile names, churn, answers that vary.

    python -m tests.helpers.crowd --port 0 --peers 1000 --churn 2

prints `{"url": …}`, and ends with its standard input. A line there is a command: `join`, `leave`, `kill`, `return`,
`move` or `gap`; each is answered by one line with the peer ids that it was about.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from peers.wire.messages import PROTOCOL_VERSION, Opinion, Pong, RoundTrip, Status
from routing.coordinates import Coordinate, distance_s
from routing.identity import peer_id_of
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId
from routing.records import RECORD_LIFETIME_S, Announcement, HostedAdapter, PeerState
from routing.router import Router
from swarm.dashboard.app import Dashboard, make_app
from swarm.dashboard.core import Core
from swarm.dashboard.feed import Feed
from swarm.dashboard.history import History
from swarm.simulation.world import draw_place
from swarm.web.server import listen, make_server, url

MODEL = ModelId(hashlib.sha256(b"a crowd's model").digest())
OTHER_MODEL = ModelId(hashlib.sha256(b"another one").digest())
BLOCKS = 32
LOOK_S = 3.0
"""Between two looks, while seconds come as they should; where they are late, at each of them."""
HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(2)>",
    "{{constructor.constructor('alert(3)')()}}",
    "javascript:alert(4)",
    "../../etc/passwd",
    "'; DROP TABLE events; --",
    "W" * 48,
    "名前" * 24,
    "=cmd|' /C calc'!A0",
    "$(reboot) `reboot`",
    "",
)
"""Names that a record may carry."""
ADAPTERS = tuple(
    HostedAdapter(name, hashlib.sha256(name.encode()).digest()[:16]) for name in ("pirate", "poet", "W" * 32)
)
ENTRY = f"/ip4/1.1.1.1/tcp/4001/p2p/{peer_id_of(hashlib.sha256(b'entry').digest())}"


@dataclasses.dataclass
class Member:
    """One simulated peer; `place` is where it is."""

    record: Announcement
    place: Coordinate
    answers: bool = True
    alive: bool = True
    started_s: float = 0.0


class Crowd:
    """Simulated peers and the core, feed and history that see them. Virtual: `now_s` is an argument."""

    def __init__(self, peers: int = 1000, *, seed: int = 0, now_s: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.members: dict[PeerId, Member] = {}
        self.history = History.open(None, "crowd")
        self.core = Core(Router(), network="crowd", now_s=now_s)
        self.feed = Feed(self.core, epoch=f"crowd{seed}")
        self._count = 0
        self._called = 0
        self._kept = 0
        self._looked_s = now_s
        for _ in range(peers):
            self.join(now_s)
        self.look(now_s)
        self.core.advance(now_s)
        self.call(now_s, len(self.members))
        self.publish(now_s)

    # --- what happens; each returns whom it is about ---

    def join(self, now_s: float) -> list[PeerId]:
        rng, number = self.rng, self._count
        self._count += 1
        peer_id = peer_id_of(hashlib.sha256(f"crowd {number}".encode()).digest())
        other = number % 10 == 9
        place, decode_s = draw_place(rng), 0.004 * rng.lognormvariate(0, 0.5)
        name = HOSTILE[number // 7 % len(HOSTILE)] if number % 7 == 0 else f"peer-{number}"
        cache_tokens = rng.choice((20_000, 100_000, 400_000))
        record = Announcement(
            peer_id=peer_id,
            model=OTHER_MODEL if other else MODEL,
            model_name="<b>other</b>/model & co" if other else "crowd-8b-instruct",
            num_blocks=BLOCKS,
            spans=BlockSpans.of(self._span()),
            state=PeerState.ONLINE,
            dtype=rng.choice(("bfloat16", "float32")),
            quantization=rng.choice(("none", "none", "int8", "int4")),
            version=rng.choice(("0.1.0", "0.1.1", "<i>9</i>")),
            protocol=PROTOCOL_VERSION,
            name=name,
            addresses=self._addresses(peer_id, number),
            decode_s_per_block=decode_s,
            prefill_s_per_token_block=decode_s / 8,
            cache_tokens=cache_tokens,
            free_tokens=cache_tokens,
            place=place,
            max_blocks=12,
            uplink_bytes_per_s=number % 3 * 2**20,
            adapters=ADAPTERS[: number % 4],
            sequence=1,
            expires_at_s=now_s + RECORD_LIFETIME_S,
        )
        self.members[peer_id] = Member(record, place, answers=number % 23 != 5, started_s=now_s)
        return [peer_id]

    def leave(self, now_s: float) -> list[PeerId]:
        """One says goodbye, and is gone."""
        if not self._live():
            return []
        member = self._any()
        self._change(member, now_s, state=PeerState.DRAINING)
        self.core.read([member.record], now_s)
        self.core.advance(now_s)
        member.alive = False
        self.core.silent(member.record.peer_id, "the connection was refused", now_s)
        return [member.record.peer_id]

    def kill(self, now_s: float) -> list[PeerId]:
        """One dies without a word; its record expires."""
        if not self._live():
            return []
        member = self._any()
        member.alive = False
        self.core.silent(member.record.peer_id, "did not answer within 3 s", now_s)
        return [member.record.peer_id]

    def return_(self, now_s: float) -> list[PeerId]:
        """One that was gone is back."""
        gone = [member for member in self.members.values() if not member.alive]
        if not gone:
            return []
        member = self.rng.choice(gone)
        member.alive = True
        self._change(member, now_s, state=PeerState.ONLINE)
        return [member.record.peer_id]

    def move(self, now_s: float) -> list[PeerId]:
        if not self._live():
            return []
        member = self._any()
        self._change(member, now_s, spans=BlockSpans.of(self._span()))
        return [member.record.peer_id]

    def gap(self, now_s: float) -> list[PeerId]:
        """All that hold the model's last block pause."""
        holders = [m for m in self._live() if m.record.model == MODEL and m.record.spans.end == BLOCKS]
        for member in holders:
            self._change(member, now_s, state=PeerState.PAUSED)
        return [member.record.peer_id for member in holders]

    # --- what the dashboard sees of it ---

    def look(self, now_s: float) -> None:
        """All that live renew their records, and the index is read."""
        self._looked_s = now_s
        for member in self._live():
            self._change(member, now_s)
        self.core.read([member.record for member in self._live()], now_s)

    def call(self, now_s: float, count: int) -> None:
        """`count` peers are asked how they are, in turn."""
        live = self._live()
        for _ in range(min(count, len(live))):
            self._called += 1
            member = live[self._called % len(live)]
            if member.answers:
                rtt_s = distance_s(Coordinate(), member.place) * self.rng.uniform(0.95, 1.1)
                self.core.answered(member.record.peer_id, rtt_s, self._pong(member, now_s, live), now_s)
            else:
                self.core.silent(member.record.peer_id, "did not answer within 3 s <b>", now_s)

    def publish(self, now_s: float) -> bool:
        self.core.advance(now_s)
        self.history.add(self.core.models, self.core.events_after(self._kept), now_s)
        self._kept = self.core.total_events
        return self.feed.tick(now_s)

    def second(self, now_s: float, *, churn: float = 0.0) -> bool:
        """One second of life: renewals, 40 calls, and `churn` things that happen on average."""
        whole, part = divmod(churn, 1)
        for _ in range(int(whole) + (self.rng.random() < part)):
            self.rng.choice((self.join, self.leave, self.kill, self.return_, self.move))(now_s)
        if now_s - self._looked_s >= LOOK_S:
            self.look(now_s)
        self.call(now_s, 40)
        return self.publish(now_s)

    def dashboard(self, news: Callable[[], Any], clock: Callable[[], float]) -> Dashboard:
        """Its dials find nobody: the addresses are made up."""
        return Dashboard(
            core=self.core,
            feed=self.feed,
            history=self.history,
            entrance=(ENTRY,),
            news=news,
            stranger=self._stranger,
            clock=clock,
        )

    @staticmethod
    @asynccontextmanager
    async def _stranger() -> AsyncIterator[Links]:
        transport = MemoryNetwork().transport(peer_id_of(bytes(32)), client_mode=True)
        yield Links(transport, network="crowd", software="crowd")

    def _live(self) -> list[Member]:
        return [member for member in self.members.values() if member.alive]

    def _any(self) -> Member:
        return self.rng.choice(self._live())

    def _span(self) -> BlockSpan:
        length = self.rng.randint(2, 12)
        start = self.rng.randint(0, BLOCKS - length)
        return BlockSpan(start, start + length)

    @staticmethod
    def _addresses(peer_id: PeerId, number: int) -> tuple[str, ...]:
        if number % 11 == 3:
            return (f"{ENTRY}/p2p-circuit/p2p/{peer_id}",)
        return (f"/ip4/198.51.100.{number % 250 + 1}/tcp/{4001 + number}/p2p/{peer_id}",)

    @staticmethod
    def _change(member: Member, now_s: float, **fields: Any) -> None:
        record = member.record
        member.record = dataclasses.replace(
            record, sequence=record.sequence + 1, expires_at_s=now_s + RECORD_LIFETIME_S, **fields
        )

    def _pong(self, member: Member, now_s: float, live: list[Member]) -> Pong:
        rng, record = self.rng, member.record
        others = rng.sample(live, min(6, len(live)))
        blamed = rng.choice(live).record.peer_id
        return Pong(
            nonce=1,
            free_tokens=rng.randint(0, record.cache_tokens),
            queued_tokens=rng.randint(0, 200),
            sessions=rng.randint(0, 40),
            status=Status(
                uptime_s=now_s - member.started_s,
                queue_s=rng.random() / 20,
                decode_s_per_block=record.decode_s_per_block * rng.uniform(1.0, 2.0),
                pages=record.cache_tokens // 16,
                free_pages=rng.randint(0, record.cache_tokens // 16),
                memory_offered_bytes=8 << 30,
                memory_used_bytes=rng.randint(1 << 30, 8 << 30),
                steps=rng.randint(0, 10**6),
                tokens=rng.randint(0, 10**8),
                device="cuda:0<script>",
                moved_from=((0, 4),),
                moved_ago_s=60.0,
                round_trips=tuple(
                    RoundTrip(other.record.peer_id, distance_s(member.place, other.place), 3.0) for other in others
                ),
                opinions=(Opinion(blamed, 1.5, 12.0, 4.0, "<u>did not answer</u>"),) if rng.random() < 0.05 else (),
            ),
        )


COMMANDS = ("join", "leave", "kill", "return", "move", "gap")


class CrowdServer:
    """A crowd that lives in real time behind a real server. `serve` runs until `stop`."""

    def __init__(self, peers: int, *, port: int = 0, churn: float = 0.0, seed: int = 0) -> None:
        self.crowd = Crowd(peers, seed=seed, now_s=time.time())
        self.listener = listen("127.0.0.1", port)
        self.url = url(self.listener)
        self._churn = churn
        self._news = asyncio.Event()
        self.dashboard = self.crowd.dashboard(self._wait, time.time)
        self._server = make_server(make_app(self.dashboard), close_within_s=1.0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.up = threading.Event()

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._server.serve(sockets=[self.listener]))
        self.up.set()
        try:
            while not serving.done():
                await asyncio.wait({serving}, timeout=1.0)
                self._tell(self.crowd.second(time.time(), churn=self._churn))
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            self.crowd.history.close()
            self.listener.close()

    def do(self, command: str) -> list[PeerId]:
        """From any thread: one of COMMANDS happens, and readers hear of it at once."""
        assert self._loop is not None

        async def happen() -> list[PeerId]:
            action: Callable[[float], list[PeerId]] = getattr(self.crowd, "return_" if command == "return" else command)
            now_s = time.time()
            peers = action(now_s)
            self.crowd.look(now_s)
            self._tell(self.crowd.publish(now_s))
            return peers

        return asyncio.run_coroutine_threadsafe(happen(), self._loop).result(60)

    def wait(self, condition: Callable[[], bool]) -> None:
        """From any thread: until the server's loop finds it true."""
        assert self._loop is not None

        async def look() -> None:
            async with asyncio.timeout(60):
                while not condition():  # noqa: ASYNC110  # nothing tells when a reader has gone
                    await asyncio.sleep(0.01)

        asyncio.run_coroutine_threadsafe(look(), self._loop).result(60)

    def stop(self) -> None:
        """From any thread."""

        def end() -> None:
            self.dashboard.stopping.set()
            self._server.should_exit = True

        assert self._loop is not None
        self._loop.call_soon_threadsafe(end)

    async def _wait(self) -> None:
        await self._news.wait()

    def _tell(self, changed: bool) -> None:
        if changed:
            self._news.set()
            self._news = asyncio.Event()


@contextmanager
def serving(peers: int = 1000, *, port: int = 0, churn: float = 0.0, seed: int = 0) -> Iterator[CrowdServer]:
    """A crowd's server in a thread."""
    server = CrowdServer(peers, port=port, churn=churn, seed=seed)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    server.up.wait(60)
    try:
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--churn", type=float, default=0.0, help="things that happen per second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(options.peers, port=options.port, churn=options.churn, seed=options.seed) as server:
        sys.stdout.write(json.dumps({"url": server.url}) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            answer = server.do(line.strip()) if line.strip() in COMMANDS else f"one of {COMMANDS}"
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
