"""A node's entry into its network: the transport and DHT under its remembered identity and port."""

from __future__ import annotations

import logging
import re
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from peers.errors import AddressInUse
from peers.host.config import NodeOptions
from peers.identity import load_identity
from peers.platform import require_platform
from routing.identity import SigningKey

if TYPE_CHECKING:
    from peers.transport.hivemind_p2p import HivemindNode

logger = logging.getLogger(__name__)


async def start_node(config: NodeOptions, stack: AsyncExitStack) -> tuple[HivemindNode, SigningKey]:
    """The transport and DHT under the node's remembered identity and, unless told where to listen, remembered port."""
    require_platform()
    from peers.transport.hivemind_p2p import HivemindNode, NodeConfig  # only where the platform has what it needs

    key = load_identity(config.identity)
    port_file = config.identity.with_suffix(".port")
    remembered = _remembered(port_file)
    port = remembered or _free_port()

    def node_config(port: str) -> NodeConfig:
        return NodeConfig(
            signing_key=key,
            listen=config.listen or (f"/ip4/0.0.0.0/tcp/{port}",),
            announce=config.announce,
            initial_peers=config.initial_peers,
            network=config.network,
        )

    try:
        node = await HivemindNode.create(node_config(port))
    except AddressInUse:
        if config.listen:
            raise
        logger.warning("port %s of last time is taken; using another for this time", port)
        # not remembered: a router may forward last time's port to this machine
        node, port = await HivemindNode.create(node_config(_free_port())), remembered
    stack.push_async_callback(node.close)
    if not config.listen and port != remembered:
        with suppress(OSError):  # the disk is full, or not ours: the next start takes another port
            port_file.write_text(port)
    return node, key


def _remembered(file: Path) -> str:
    """The port in `file`; empty where there is none."""
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return text if re.fullmatch("[1-9][0-9]{0,4}", text) and int(text) < 1 << 16 else ""


def _free_port() -> str:
    with socket.create_server(("", 0)) as server:
        return str(server.getsockname()[1])
