"""The `p2pd` process: its start and end, its control socket, and what its errors mean to us.

Owns the child process and a private folder with its sockets. Knows no peers beyond the request at hand.

The daemon never outlives its parent: it ends when the first persistent connection (hivemind's `P2P` holds it) breaks,
as it does when this process is killed, and after `_IDLE_TIMEOUT` when that connection was never made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.multiaddr.exceptions import Error as MultiaddrError

from peers.errors import AddressInUse, PeerSilent, PeerUnreachable, ProtocolError, Refused, StreamClosed
from peers.transport.framing import FramedStream
from peers.transport.hivemind_p2p.folder import SocketFolder, remove_abandoned
from peers.transport.patience import Patience
from routing.addresses import validate_multiaddr
from routing.errors import InvalidAddress, Unavailable
from routing.identity import SigningKey, identity_file_bytes, public_key_of
from routing.ids import PeerId

logger = logging.getLogger(__name__)

_CONTROL_TIMEOUT_S: Final = 10.0
_STOP_TIMEOUT_S: Final = 5.0
_IDLE_TIMEOUT: Final = "30s"
# libp2p closes the least useful connections above the high mark; its default of 512 is below a bootstrap's load.
_CONNECTIONS_LOW: Final = 1536
_CONNECTIONS_HIGH: Final = 2048
_FAMILIES: Final = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


@contextlib.contextmanager
def translated(peer: PeerId | None) -> Iterator[None]:
    """Turn every error of hivemind, protobuf and the sockets below into one of ours.

    With a peer, failures to reach it become PeerUnreachable, its complaints Refused, its nonsense ProtocolError. What
    goes wrong between us and the daemon (always, without a peer) becomes Unavailable.
    """
    try:
        yield
    except TimeoutError as error:
        if peer is None:
            raise Unavailable("the libp2p daemon does not answer", hint="is this machine overloaded?") from error
        raise PeerSilent(f"peer {peer} did not answer in time") from error
    except P2PHandlerError as error:
        raise Refused(f"peer {peer} refused: {str(error)[:300]}", code="dht") from error
    except P2PDaemonError as error:
        # "Connect failed. msg=failed to dial: …\n  * [/ip4/…] dial tcp4 …: connect: connection refused\n  * [/ip4/…] …"
        lines = str(error).splitlines()
        told = next((line for line in lines[:0:-1] if not line.endswith("dial backoff")), lines[-1])
        reason = told.removeprefix("Connect failed. msg=").lstrip(" *")
        if peer is None:
            raise Unavailable(f"the libp2p daemon refused: {reason}") from error
        late = "deadline exceeded" in reason or "timeout" in reason
        raise (PeerSilent if late else PeerUnreachable)(f"cannot reach peer {peer}: {reason}") from error
    except (OSError, EOFError, StreamClosed) as error:
        raise Unavailable("the libp2p daemon is not running", hint="start this node again") from error
    except (DecodeError, ValueError) as error:
        raise ProtocolError(f"{peer or 'the libp2p daemon'} sent what cannot be decoded: {error}") from error


class Daemon:
    """One `p2pd`, from `start` to `stop`."""

    def __init__(self, key: SigningKey, *, listen: Sequence[str], announce: Sequence[str], client_mode: bool) -> None:
        self._key = key
        self._listen = listen
        self._announce = announce
        self._client_mode = client_mode
        remove_abandoned()
        self._folder = SocketFolder()
        self.control_path: Final = self._folder.path / "control"
        self.streams_path: Final = self._folder.path / "streams"
        """Where the daemon connects for each incoming stream."""
        self._process: asyncio.subprocess.Process | None = None
        self._output: deque[str] = deque(maxlen=20)
        self._reading: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Returns when the daemon listens. Raises AddressInUse, Unavailable."""
        for address in () if self._client_mode else self._listen:
            _check_free(address)
        identity = self._folder.path / "identity"
        identity.touch(mode=0o600)
        identity.write_bytes(identity_file_bytes(self._key))
        ready = asyncio.get_running_loop().create_future()
        with as_file(files("hivemind.hivemind_cli") / "p2pd") as program:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    program,
                    *self._arguments(identity),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
                    # Its own session: Ctrl-C in a terminal is for us alone.
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(
                    f"cannot run the libp2p daemon {program}: {error.strerror}",
                    hint="hivemind brings it for Linux and macOS on x86-64 and arm64: install hivemind again",
                ) from error
        self._reading = asyncio.create_task(self._read_output(ready), name="p2pd output")
        if not await ready:
            said = "; ".join(self._output)
            raise Unavailable(
                f"the libp2p daemon did not start: {said[-500:] or 'it said nothing'}",
                hint="listen on an address of this machine and over TCP, such as /ip4/0.0.0.0/tcp/0",
            )
        identity.unlink()

    async def stop(self) -> None:
        """Returns when the process is gone and its folder removed. Idempotent."""
        self._stopping = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                self._process.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("p2pd (process %d) does not end: killing it", self._process.pid)
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
        if self._reading is not None:
            await self._reading
        self._folder.remove()

    async def wait_stopped(self) -> None:
        """Returns after `stop`. Raises Unavailable when the daemon ends by itself."""
        assert self._process is not None
        code = await self._process.wait()
        if not self._stopping:
            raise Unavailable(f"the libp2p daemon ended with status {code}", hint="start this node again")

    async def ask(
        self, request: p2pd_pb2.Request, *, peer: PeerId | None = None, timeout_s: float = _CONTROL_TIMEOUT_S
    ) -> p2pd_pb2.Response:
        """One question on a connection of its own. `peer` is whom a failure is about."""
        response = p2pd_pb2.Response()
        with translated(peer):
            async with Patience(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self.control_path)
                try:
                    await write_pbmsg(writer, request)
                    await read_pbmsg_safe(reader, response)
                finally:
                    writer.close()
            raise_if_failed(response)
        return response

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, timeout_s: float) -> None:
        """Dial, unless there is a connection. `addresses` end in the peer's id. Raises PeerUnreachable."""
        request = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer).to_bytes(),
            addrs=[Multiaddr(address.removesuffix(f"/p2p/{peer}")).to_bytes() for address in addresses],
            timeout=math.ceil(timeout_s),
        )
        await self.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request), peer=peer, timeout_s=timeout_s)

    async def disconnect(self, peer: PeerId) -> None:
        request = p2pd_pb2.DisconnectRequest(peer=PeerID.from_base58(peer).to_bytes())
        await self.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT, disconnect=request))

    async def open_stream(self, peer: PeerId, protocol: str, *, timeout_s: float) -> FramedStream:
        """Raises PeerUnreachable, also when the peer does not serve the protocol."""
        request = p2pd_pb2.StreamOpenRequest(
            peer=PeerID.from_base58(peer).to_bytes(), proto=[protocol], timeout=math.ceil(timeout_s)
        )
        stream = FramedStream()
        with translated(peer):
            try:
                async with Patience(timeout_s):
                    loop = asyncio.get_running_loop()
                    transport, _ = await loop.create_unix_connection(lambda: stream, str(self.control_path))
                    transport.write(_delimited(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request)))
                    response = p2pd_pb2.Response.FromString(await stream.greeting)
                    raise_if_failed(response)
                    stream.remote = peer_id_from(response.streamInfo.peer)
            except BaseException:
                stream.abort()
                raise
        return stream

    def _arguments(self, identity: Path) -> list[str]:
        flags = {
            "listen": f"/unix{self.control_path}",
            "id": str(identity),
            "idleTimeout": _IDLE_TIMEOUT,
            "connManager": "1",
            "connLo": str(_CONNECTIONS_LOW),
            "connHi": str(_CONNECTIONS_HIGH),
            "relay": "1",
            # TLS alone: with hardware AES it takes half the time of Noise, which would be preferred.
            "noise": "0",
        }
        if self._client_mode:
            flags |= {"dhtClient": "1", "noListenAddrs": "1"}
        else:
            flags |= {"dhtServer": "1", "hostAddrs": ",".join(self._listen)}
            if not all(is_loopback(address) for address in self._listen):
                flags |= {"autonat": "1", "natPortMap": "1"}
        if self._announce:
            flags["announceAddrs"] = ",".join(self._announce)
        return [f"-{name}={value}" for name, value in flags.items()]

    async def _read_output(self, ready: asyncio.Future[bool]) -> None:
        """`ready` becomes true when the daemon says who it is, false when it ends before."""
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            logger.debug("p2pd: %s", text)
            self._output.append(text)
            if text.startswith("Peer ID:") and not ready.done():
                ready.set_result(True)
        if not ready.done():
            ready.set_result(False)


def _check_free(address: str) -> None:
    """Raises AddressInUse when nobody, or somebody else, could listen there.

    libp2p shares its ports (SO_REUSEPORT), so two daemons on one port would both start, and the kernel would deal each
    of them half of the connections.
    """
    _, family, host, protocol, port, *_ = address.split("/")
    if family not in _FAMILIES or protocol != "tcp":
        return
    with socket.socket(_FAMILIES[family], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == "ip6":
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise AddressInUse(
                f"cannot listen on {address}: {error.strerror}",
                hint="choose another port (0 lets the system choose) or address, or stop what uses this one",
            ) from error


def peer_id_from(raw: bytes) -> PeerId:
    """The peer id behind the daemon's bytes. Raises InvalidAddress when it is not an Ed25519 identity."""
    peer = PeerId(PeerID(raw).to_base58())
    public_key_of(peer)
    return peer


def address_text(raw: bytes) -> str | None:
    """A multiaddr of the daemon as text; None for a kind that this network does not dial."""
    try:
        return validate_multiaddr(str(Multiaddr(raw)), need_peer_id=False)
    except (MultiaddrError, InvalidAddress, ValueError):
        return None


def is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _delimited(message: Message) -> bytes:
    raw: bytes = message.SerializeToString()
    prefix = bytearray()
    size = len(raw)
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + raw
