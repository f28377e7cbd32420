"""What a flood of true identities does to a key that they fill to the brim, over real nodes.

The number: a key holds 800 identities (MAX_RECORDS_PER_KEY). A peer's key is one of its model's 16 and follows from its
id, so an attacker makes 16 key pairs for each identity that falls under a chosen key (about 12,800 for the 800), and
needs 12,800 identities that fall well to shut a model's every key. Each writes over an authenticated connection of its
own, at each of the nodes nearest to the key, and again at least every 300 s.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest

from peers.transport.hivemind_p2p import HivemindNode, NodeConfig
from routing.errors import InvalidRecord, Unavailable
from routing.identity import SigningKey
from routing.records import CLOCK_SLACK_S, MAX_RECORDS_PER_KEY, model_key
from tests.peers.transport.nodes import MODEL, NETWORK, record, signing_key

LIFETIME_S = 100.0


def under(key: str) -> Iterator[SigningKey]:
    """Identities that announce under this key: one in sixteen."""
    return (one for one in map(signing_key, itertools.count(1000)) if model_key(NETWORK, MODEL, one.peer_id) == key)


async def test_who_is_under_a_full_key_stays_and_a_newcomer_is_told_and_waits() -> None:
    owner = signing_key(2)
    key = model_key(NETWORK, MODEL, owner.peer_id)
    strangers = under(key)
    async with contextlib.AsyncExitStack() as stack:

        async def node(signing_key: SigningKey, *entries: HivemindNode, client_mode: bool = False) -> HivemindNode:
            addresses = tuple(address for entry in entries for address in entry.addresses)
            config = NodeConfig(
                network=NETWORK, signing_key=signing_key, initial_peers=addresses, client_mode=client_mode
            )
            return await stack.enter_async_context(await HivemindNode.create(config))

        bootstrap = await node(signing_key(1))
        honest = await node(owner, bootstrap)
        reader = await node(signing_key(3), bootstrap, client_mode=True)
        await honest.store.put(record(owner))

        tables = [each.store.table for each in (bootstrap, honest) if each.store.table is not None]
        expires_at_s = time.time() + LIFETIME_S
        for stranger in itertools.islice(strangers, MAX_RECORDS_PER_KEY - 1):
            one = record(stranger, expires_at_s=expires_at_s)
            for table in tables:
                table.put(one, sender=one.subkey, now_s=time.time())
        one = record(next(strangers))
        for table in tables:
            with pytest.raises(InvalidRecord, match="is full"):
                table.put(one, sender=one.subkey, now_s=time.time())

        # Who was there before renews, and is read among all the others.
        renewed = record(owner, sequence=2)
        await honest.store.put(renewed)
        found = await reader.store.get([key])
        assert renewed in found
        assert len(found) == MAX_RECORDS_PER_KEY

        # A newcomer is told what is wrong, and tries on (peers.serving.announce).
        newcomer = next(strangers)
        late = await node(newcomer, bootstrap)
        with pytest.raises(Unavailable, match="is full"):
            await late.store.put(record(newcomer))
        # It keeps its own record: in a swarm as small as this one, readers ask it too and find it all the same.
        found = await reader.store.get([key])
        assert {one.subkey for one in found} >= {owner.peer_id, newcomer.peer_id}

        # Another key of the same model has room, and an identity that falls under it is announced as ever.
        elsewhere = next(k for k in map(signing_key, range(4, 99)) if model_key(NETWORK, MODEL, k.peer_id) != key)
        neighbour = await node(elsewhere, bootstrap)
        await neighbour.store.put(record(elsewhere))

        # As soon as strangers do not renew, there is room again.
        for table in tables:
            table.get(key, now_s=expires_at_s + CLOCK_SLACK_S)
        await late.store.put(record(newcomer, sequence=2))
