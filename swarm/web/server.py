"""An HTTP server inside a program that has its own signals and its own end.

Owns how uvicorn is set up for us. Knows no application.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from routing.errors import CallerError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def is_exposed(host: str) -> bool:
    """Whether others than this machine can ask a server that listens there."""
    return host not in LOOPBACK


class Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: whoever runs `serve` ends it by `should_exit`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose. Raises CallerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named as TCP, or asyncio leaves Nagle's algorithm on: an answer's second packet then waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, TypeError) as error:  # the latter of what cannot be a host's name at all
        listener.close()
        why = error.strerror if isinstance(error, OSError) else "that is no host"
        raise CallerError(
            f"cannot listen on {host} port {port}: {why}", hint="choose another with --port or --host"
        ) from error
    listener.setblocking(False)
    return listener


def make_server(app: ASGIApp, *, close_within_s: float) -> Server:
    """`close_within_s`: how long open answers have, once the server was told to end."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",  # bounds the headers of a request, which httptools does not
            log_config=None,
            log_level="error",  # warnings are about what strangers sent, as often as they like
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(close_within_s)),
            h11_max_incomplete_event_size=64 << 10,
        )
    )


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
