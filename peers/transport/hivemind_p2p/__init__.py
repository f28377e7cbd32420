"""libp2p by way of hivemind: streams between peers, and the DHT's store of records.

This package is the only importer of hivemind. `daemon` owns the `p2pd` process and translates every foreign error,
`streams` is the `Transport`, `detour` its way to peers that were away, `dht` the `RecordStore`, `node` wires them and
keeps them joined to the network.

What of hivemind is used, and what is not:

- The daemon is started here and handed to `P2P.replicate`, because `P2P.create` leaves it in the terminal's process
  group, where Ctrl-C can end it before the node has drained, and keeps only the last line of its complaint.
- Streams are the daemon's binary streams with our own bounded frames; protobuf streams read unbounded lengths.
- `DHTNode` finds the nearest nodes. Its `store` and `get` are not used: they put any number of keys into one answer,
  lose a whole dictionary to one bad record, take the latest expiry for the truth and cache strangers' answers.
- `dht.RecordProtocol` replaces the storage half of `DHTProtocol`.
"""

from __future__ import annotations

import logging

from hivemind.utils.logging import use_hivemind_log_handler

from peers.transport.hivemind_p2p.dht import DhtStore
from peers.transport.hivemind_p2p.node import HivemindNode, NodeConfig
from peers.transport.hivemind_p2p.streams import HivemindTransport

__all__ = ["DhtStore", "HivemindNode", "HivemindTransport", "NodeConfig"]

# hivemind logs to stderr by itself, for its own developers; what a person must know is said by our errors.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.ERROR)
logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames the level for the whole process
