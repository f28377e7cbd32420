from __future__ import annotations

import asyncio
import socket

from swarm.web.server import listen, url


async def test_what_is_written_leaves_at_once() -> None:
    """Else each answer waits for the reader's delayed acknowledgement, 40 ms on Linux."""
    listener = listen("127.0.0.1", 0)
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accept, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(10):
            assert await accepted
        writer.close()
        await writer.wait_closed()


def test_a_url_can_be_pasted() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
