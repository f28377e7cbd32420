"""Records in hivemind's DHT: what this node keeps for others, and how it publishes and reads.

Owns the calls between DHT nodes and the lookup. Knows no record content: `peers.transport.record_table` says what is
kept, `routing.records` what is valid. Every answer is verified here again, record by record, because the node that
gives it is a stranger too.

On the wire these are hivemind's own messages, with these meanings:

    FindRequest.keys      a DHT id (20 bytes): who is nearest to it? An id and, behind it, the key it is the SHA-1 of:
                          which records do you hold, besides?
    FindResponse.results  answers to the first so many of the keys, at least one, as many as fit; ask again for the rest
    FindResult.value      MessagePack: [[subkey, value, expiry], …]; nearest_peer_ids: peers; the ids follow from them
    StoreRequest          exactly one record: keys = [id and key], subkeys = [peer id], values = [the signed bytes];
                          refused with an error that says why

A DHT id is the SHA-1 of the node's peer id: nobody chooses a place in the key space, and a node that restarts keeps it.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2

from peers.errors import ProtocolError
from peers.transport.allowance import Allowance
from peers.transport.hivemind_p2p.daemon import peer_id_from, translated
from peers.transport.patience import Patience
from peers.transport.record_table import RecordTable
from routing.errors import InvalidAddress, InvalidRecord, PeerError, SwarmError, Unavailable
from routing.identity import PEER_ID_CHARS
from routing.ids import PeerId
from routing.records import CLOCK_SLACK_S, MAX_RECORD_BYTES, MAX_RECORDS_PER_KEY, verify_record
from routing.store import StoredRecord

logger = logging.getLogger(__name__)

REPLICAS: Final = 6
"""Nodes that keep a record, and nodes that a reader asks for each key."""
BUCKET_SIZE: Final = 20
"""Kademlia's k: nodes remembered for each distance, and the neighbours in an answer."""
CALL_TIMEOUT_S: Final = 4.0
LOOKUP_TIMEOUT_S: Final = 4.0
STRAGGLER_GRACE_S: Final = 1.5
"""Once some node has answered for each key, the others get this long: two round trips by satellite."""
AVOID_S: Final = 5.0
"""A node that did not answer is left out of lookups for this long."""
MAX_QUERIES_PER_CALL: Final = 64
MAX_ANSWER_BYTES: Final = 1024 * 1024
MAX_BAD_RECORDS: Final = 16
"""An honest node never hands out a bad record: after so many the rest of its answer is not looked at."""
MAX_REFUSED_NAMED: Final = 256
"""Peers whose record is refused are named in the log, each once and so many at most: anybody can be thousands."""
CALLS_AT_ONCE: Final = 200
CALLS_PER_S: Final = 20
"""What one peer may ask of us: twenty times what a node that announces and reads needs."""

_MAX_SEEN_KEYS: Final = 1024
_VERIFY_BATCH: Final = 32
"""Signatures checked (about 0.1 ms each) before other tasks get a turn."""

_Record = tuple[
    Annotated[str, msgspec.Meta(max_length=PEER_ID_CHARS)],
    Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)],
    float,
]
_DECODER: Final = msgspec.msgpack.Decoder(Annotated[list[_Record], msgspec.Meta(max_length=MAX_RECORDS_PER_KEY)])


class _LiveCalls(dict[Any, "asyncio.Future[Any]"]):
    """Pending calls that only seem to contain those which still wait.

    hivemind's one reader of responses ends for ever when it answers a call that was cancelled in the same tick.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


@dataclass(frozen=True, slots=True)
class _Answer:
    records: bytes
    neighbours: dict[DHTID, PeerID]


class RecordProtocol(DHTProtocol):  # type: ignore[misc]  # hivemind is untyped
    """hivemind's routing table and pings, with our own storage behind bounded calls."""

    # hivemind caches these on the class that is asked first, and a subclass would inherit its parent's.
    _rpc_handlers = None
    _stub_type = None

    table: RecordTable | None
    """None for a node that keeps nothing for others."""
    namespace: str
    _refused: set[str]
    """Whose records were."""

    @classmethod
    async def start(cls, p2p: P2P, network: str, *, client_mode: bool) -> Self:
        self: Self = await cls.create(
            p2p,
            node_id_of(p2p.peer_id),
            bucket_size=BUCKET_SIZE,
            depth_modulo=5,
            num_replicas=REPLICAS,
            wait_timeout=CALL_TIMEOUT_S,
            client_mode=True,  # else `create` would serve under names that all networks share
        )
        self.namespace = f"/hive/{network}/dht"
        self.table = None if client_mode else RecordTable()
        self._refused = set()
        self._allowance = Allowance(burst=CALLS_AT_ONCE, per_second=CALLS_PER_S)
        if not client_mode:
            self.client_mode = False
            self.node_info = dht_pb2.NodeInfo(node_id=self.node_id.to_bytes())
            await self.add_p2p_handlers(p2p, namespace=self.namespace)
        return self

    def get_stub(self, peer: PeerID) -> Any:
        return super(DHTProtocol, self).get_stub(self.p2p, peer, namespace=self.namespace)

    # What others ask of us. Whatever is raised here reaches the caller as text.

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        self._charge(context)
        return await super().rpc_ping(request, context)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        self._charge(context)
        if not 1 <= len(request.keys) <= MAX_QUERIES_PER_CALL:
            raise ProtocolError(f"{len(request.keys)} keys in one call; 1 to {MAX_QUERIES_PER_CALL} are allowed")
        response = dht_pb2.FindResponse(peer=self.node_info)
        room = MAX_ANSWER_BYTES
        for query in request.keys:
            node_id, key = _read_query(query)
            value = b"" if key is None else self.packed(key)
            room -= len(value)
            if room < 0 and response.results:
                break
            near = self.routing_table.get_nearest_neighbors(node_id, BUCKET_SIZE, exclude=node_id_of(context.remote_id))
            response.results.append(
                dht_pb2.FindResult(
                    type=dht_pb2.FOUND_DICTIONARY if value else dht_pb2.NOT_FOUND,
                    value=value,
                    nearest_peer_ids=[peer.to_bytes() for _, peer in near],
                )
            )
        await self._meet(request.peer, context)
        return response

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        self._charge(context)
        parts = (request.keys, request.subkeys, request.values, request.expiration_time)
        if any(len(part) != 1 for part in parts):
            raise ProtocolError("a store call carries exactly one record")
        _, key = _read_query(request.keys[0])
        if key is None or self.table is None:
            raise ProtocolError("nothing can be stored there")
        record = StoredRecord(
            key=key,
            subkey=request.subkeys[0].decode("ascii"),
            value=request.values[0],
            expires_at_s=request.expiration_time[0],
        )
        remote = str(context.remote_id)
        try:
            self.table.put(record, sender=remote, now_s=time.time())
        except InvalidRecord as error:
            if remote not in self._refused and len(self._refused) < MAX_REFUSED_NAMED:
                self._refused.add(remote)
                logger.warning("a record of %s is refused: %s", remote, error)
            raise
        await self._meet(request.peer, context)
        return dht_pb2.StoreResponse(store_ok=[True], peer=self.node_info)

    # What we ask of others. Each raises PeerError.

    async def greet(self, peer: PeerID) -> float:
        """Enter each other's routing table. Returns our clock minus theirs, in seconds."""
        asked_s = time.time()
        response = await self._call(peer, "rpc_ping", dht_pb2.PingRequest(peer=self.node_info))
        answered_s = time.time()
        if response.peer.node_id != node_id_of(peer).to_bytes():
            raise ProtocolError(f"peer {peer} is not a DHT node of this network")
        await self.update_routing_table(node_id_of(peer), peer)
        return float((asked_s + answered_s) / 2 - response.dht_time)

    async def find(self, peer: PeerID, queries: Sequence[bytes]) -> list[_Answer]:
        """Answers to the first of the queries, at least one."""
        request = dht_pb2.FindRequest(keys=queries, peer=self.node_info)
        response = await self._call(peer, "rpc_find", request)
        if not 1 <= len(response.results) <= len(queries):
            raise ProtocolError(f"peer {peer} gave {len(response.results)} answers to {len(queries)} queries")
        await self.update_routing_table(node_id_of(peer), peer)
        return [_Answer(result.value, self._neighbours(result.nearest_peer_ids)) for result in response.results]

    async def store(self, peer: PeerID, record: StoredRecord) -> None:
        """Raises Refused with the other node's reason."""
        request = dht_pb2.StoreRequest(
            keys=[_query(record.key)],
            subkeys=[record.subkey.encode("ascii")],
            values=[record.value],
            expiration_time=[record.expires_at_s],
            peer=self.node_info,
        )
        await self._call(peer, "rpc_store", request)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, Any] | None:
        """For `DHTNode.find_nearest_nodes`: the neighbours alone. None when the peer does not answer."""
        keys = list(keys)
        try:
            answers = await self.find(peer, [key.to_bytes() for key in keys])
        except (PeerError, Unavailable) as error:
            logger.debug("DHT node %s: %s", peer, error)
            self.forget(peer)
            return None
        return {key: (None, answer.neighbours) for key, answer in zip(keys, answers, strict=False)}

    def forget(self, peer: PeerID) -> None:
        """Drop a node that does not answer from the routing table."""
        if node_id_of(peer) in self.routing_table:
            del self.routing_table[node_id_of(peer)]

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        if not responded:
            self.forget(peer_id)
        elif node_id == node_id_of(peer_id):
            await super().update_routing_table(node_id, peer_id)

    async def _call(self, peer: PeerID, method: str, request: Any) -> Any:
        with translated(PeerId(str(peer))):
            async with Patience(CALL_TIMEOUT_S):
                return await getattr(self.get_stub(peer), method)(request)

    async def _meet(self, node: dht_pb2.NodeInfo, context: P2PContext) -> None:
        if node.node_id == node_id_of(context.remote_id).to_bytes():
            await self.update_routing_table(node_id_of(context.remote_id), context.remote_id)

    def _charge(self, context: P2PContext) -> None:
        if not self._allowance.take(str(context.remote_id), now_s=time.monotonic()):
            raise ProtocolError("too many calls; wait a second")

    def packed(self, key: str) -> bytes:
        """The records held under a key, as they travel; empty when there are none."""
        records = self.table.get(key, now_s=time.time()) if self.table is not None else []
        if not records:
            return b""
        return msgspec.msgpack.encode([(record.subkey, record.value, record.expires_at_s) for record in records])

    def _neighbours(self, raw_ids: Sequence[bytes]) -> dict[DHTID, PeerID]:
        peers = (_peer(raw) for raw in raw_ids[:BUCKET_SIZE])
        return {node_id_of(peer): peer for peer in peers if peer is not None and peer != self.p2p.peer_id}


class DhtStore:
    """`RecordStore` over the DHT.

    `trusted` gives nodes to use besides the nearest: the user chose them, so nobody can hide a model's records by
    making up ids close to its keys. `first` says whether this node began the network: then it may be a DHT by itself.
    """

    def __init__(self, node: DHTNode, trusted: Callable[[], list[PeerID]], first: Callable[[], bool]) -> None:
        self._node = node
        self._protocol: RecordProtocol = node.protocol
        self._trusted = trusted
        self._first = first
        # Verified before, by key and subkey: most records did not change since the last look.
        self._seen: OrderedDict[str, dict[str, tuple[StoredRecord, int]]] = OrderedDict()
        self._verified = 0

    @property
    def table(self) -> RecordTable | None:
        """What this node keeps for others; None in client mode."""
        return self._protocol.table

    async def put(self, record: StoredRecord) -> None:
        """See `RecordStore.put`. A record of another peer than this node is refused by everyone."""
        _, near = await self._look_up([record.key], records=False)
        peers = list(dict.fromkeys([*near[record.key], *self._trusted()]))
        kept = self._keep(record)  # here too, because others may ask this node first
        outcomes = await asyncio.gather(*(self._store_at(peer, record) for peer in peers))
        if not peers and self._first():
            outcomes = kept
        if None not in outcomes:
            reason = outcomes[0] if outcomes else "none can be reached"
            raise Unavailable(
                f"no DHT node accepted the record: {reason}",
                hint="it is tried again" if peers else "check the network; it is tried again",
            )

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        """See `RecordStore.get`: verified, at most one for each key and subkey, the one with the highest sequence.

        Takes one round trip where most nodes know each other; LOOKUP_TIMEOUT_S at most, then verification.
        """
        wanted = list(dict.fromkeys(keys))
        answers, _ = await self._look_up(wanted, records=True)
        answers += [(self._node.peer_id, key, self._protocol.packed(key)) for key in wanted]
        found: dict[str, dict[str, tuple[StoredRecord, int]]] = {key: {} for key in wanted}
        for peer, key, packed in answers:
            try:
                records = _DECODER.decode(packed) if packed else []
            except msgspec.DecodeError as error:
                logger.debug("DHT node %s answered nonsense: %s", peer, error)
                continue
            bad = 0
            for subkey, value, expires_at_s in records:
                record = StoredRecord(key=key, subkey=subkey, value=value, expires_at_s=expires_at_s)
                try:
                    await self._take(record, found[key])
                except InvalidRecord as error:
                    logger.debug("DHT node %s: dropped a record: %s", peer, error)
                    bad += 1
                    if bad > MAX_BAD_RECORDS:
                        break
        for key, records_of_key in found.items():
            self._seen[key] = records_of_key
            self._seen.move_to_end(key)
        while len(self._seen) > _MAX_SEEN_KEYS:
            self._seen.popitem(last=False)
        return [record for key in wanted for record, _ in found[key].values()]

    async def _take(self, record: StoredRecord, found: dict[str, tuple[StoredRecord, int]]) -> None:
        """Keep a record of an answer unless a newer one was found. Raises InvalidRecord."""
        known = self._seen.get(record.key, {}).get(record.subkey)
        if record.subkey in found and found[record.subkey][0] == record:
            return
        now_s = time.time()
        if known is not None and known[0] == record and record.expires_at_s + CLOCK_SLACK_S > now_s:
            sequence = known[1]
        else:
            sequence = verify_record(
                record.value, key=record.key, subkey=record.subkey, stored_expiry_s=record.expires_at_s, now_s=now_s
            ).sequence
            self._verified += 1
            if self._verified % _VERIFY_BATCH == 0:
                await asyncio.sleep(0)
        if record.subkey not in found or found[record.subkey][1] < sequence:
            found[record.subkey] = (record, sequence)

    def _keep(self, record: StoredRecord) -> list[SwarmError | None]:
        """What came of keeping it here; empty in client mode."""
        if self.table is None:
            return []
        try:
            self.table.put(record, sender=str(self._node.peer_id), now_s=time.time())
        except InvalidRecord as error:
            return [error]
        return [None]

    async def _store_at(self, peer: PeerID, record: StoredRecord) -> SwarmError | None:
        try:
            await self._protocol.store(peer, record)
        except (PeerError, Unavailable) as error:
            logger.debug("DHT node %s did not take the record: %s", peer, error)
            return error
        return None

    async def _look_up(
        self, keys: Sequence[str], *, records: bool
    ) -> tuple[list[tuple[PeerID, str, bytes]], dict[str, list[PeerID]]]:
        """Ask the nodes nearest to each key, and the trusted, for its records (packed, by node and key) or just for
        nearer nodes. Also returns, for each key, the nearest nodes that answered.

        The iterative lookup of Kademlia (Maymounkov and Mazières 2002, section 2.3), for all keys at once and with one
        call for all that a node is asked; nodes that hang cost STRAGGLER_GRACE_S together.
        """
        ids = {key: DHTID.generate(source=key) for key in keys}
        nodes = {node_id_of(peer): peer for peer in self._trusted()}
        trusted = set(nodes)
        for node_id in ids.values():
            nodes |= dict(self._protocol.routing_table.get_nearest_neighbors(node_id, REPLICAS))
        asked: dict[str, set[DHTID]] = {key: set() for key in keys}
        answered: dict[str, dict[DHTID, PeerID]] = {key: {} for key in keys}
        answers: list[tuple[PeerID, str, bytes]] = []

        async def ask(node_id: DHTID, peer: PeerID, questions: list[str]) -> None:
            while questions:
                queries = [_query(key) if records else ids[key].to_bytes() for key in questions[:MAX_QUERIES_PER_CALL]]
                found = await self._protocol.find(peer, queries)
                for key, answer in zip(questions, found, strict=False):
                    answered[key][node_id] = peer
                    answers.append((peer, key, answer.records))
                    for neighbour_id, neighbour in answer.neighbours.items():
                        if neighbour not in self._node.blacklist:
                            nodes.setdefault(neighbour_id, neighbour)
                questions = questions[len(found) :]
            self._node.blacklist.register_success(peer)

        def give_up(node_id: DHTID, peer: PeerID) -> None:
            self._protocol.forget(peer)
            self._node.blacklist.register_failure(peer)
            nodes.pop(node_id, None)

        pending: dict[asyncio.Task[None], tuple[DHTID, PeerID]] = {}

        async def ask_until(enough: Callable[[], bool]) -> None:
            """Or until all have answered."""
            while True:
                for node_id, questions in _next_questions(ids, nodes, trusted, asked).items():
                    peer = nodes[node_id]
                    pending[asyncio.create_task(ask(node_id, peer, questions))] = node_id, peer
                if not pending or enough():
                    return
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    node_id, peer = pending.pop(task)
                    try:
                        task.result()
                    except (PeerError, Unavailable) as error:
                        logger.debug("DHT node %s: %s", peer, error)
                        give_up(node_id, peer)

        try:
            async with Patience(LOOKUP_TIMEOUT_S):
                await ask_until(lambda: all(answered.values()))
                async with Patience(STRAGGLER_GRACE_S):
                    await ask_until(lambda: False)
        except TimeoutError:
            for task, hanging in pending.items():
                if not task.done():
                    give_up(*hanging)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        near = {
            key: [answered[key][node_id] for node_id in heapq.nsmallest(REPLICAS, answered[key], ids[key].xor_distance)]
            for key in keys
        }
        return answers, near


async def create_dht(p2p: P2P, network: str, *, client_mode: bool) -> DHTNode:
    """A node that caches nothing and knows nobody yet."""
    p2p._client.control._pending_calls = _LiveCalls()
    node = await DHTNode.create(
        p2p=p2p,
        node_id=node_id_of(p2p.peer_id),
        bucket_size=BUCKET_SIZE,
        num_replicas=REPLICAS,
        wait_timeout=CALL_TIMEOUT_S,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        reuse_get_requests=False,
        blacklist_time=AVOID_S,
        backoff_rate=1.0,
        client_mode=True,  # its own protocol serves nobody; ours takes its place
    )
    node.protocol = await RecordProtocol.start(p2p, network, client_mode=client_mode)
    return node


@functools.lru_cache(maxsize=8192)
def node_id_of(peer: PeerID) -> DHTID:
    return DHTID.generate(source=peer.to_bytes())


# Each answer names the same few peers for each of its keys, and base58 takes a tenth of a millisecond.
@functools.lru_cache(maxsize=8192)
def _peer(raw: bytes) -> PeerID | None:
    """The peer that a stranger names; None when it is no Ed25519 peer."""
    if len(raw) > PEER_ID_CHARS:
        return None  # base58 takes quadratic time
    try:
        peer_id_from(raw)
    except InvalidAddress:
        return None
    return PeerID(raw)


def _query(key: str) -> bytes:
    raw: bytes = DHTID.generate(source=key).to_bytes() + key.encode("ascii")
    return raw


def _read_query(query: bytes) -> tuple[DHTID, str | None]:
    node_id, key = DHTID.from_bytes(query[: DHTID.HASH_NBYTES]), query[DHTID.HASH_NBYTES :].decode("ascii")
    if key and DHTID.generate(source=key) != node_id:
        raise ProtocolError("the id is not that of the key")
    return node_id, key or None


def _next_questions(
    ids: dict[str, DHTID], nodes: dict[DHTID, PeerID], trusted: set[DHTID], asked: dict[str, set[DHTID]]
) -> dict[DHTID, list[str]]:
    """Which nodes to ask for which keys next: the nearest known and the trusted, each once."""
    questions: dict[DHTID, list[str]] = {}
    for key, key_id in ids.items():
        for node_id in {*heapq.nsmallest(REPLICAS, nodes, key=key_id.xor_distance), *(trusted & nodes.keys())}:
            if node_id not in asked[key]:
                asked[key].add(node_id)
                questions.setdefault(node_id, []).append(key)
    return questions
