from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable

import pytest
from starlette.applications import Starlette

from routing.errors import CallerError
from swarm.web.server import listen, make_server, url


async def test_what_is_written_leaves_at_once() -> None:
    """Else each answer waits for the reader's delayed acknowledgement, 40 ms on Linux."""
    listener = listen("127.0.0.1", 0)
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accept, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(60):
            assert await accepted
        writer.close()
        await writer.wait_closed()


def test_a_url_can_be_pasted() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("host", ["ü..b", "192.0.2.1"])
def test_a_host_where_nobody_can_listen_is_named(host: str) -> None:
    with pytest.raises(CallerError, match=f"cannot listen on {host} port 0") as caught:
        listen(host, 0)
    assert "--host" in caught.value.hint


async def said_to(requests: Iterable[bytes]) -> list[bytes]:
    """What a server answers to each, until it closes the connection or has closed it."""
    listener = listen("127.0.0.1", 0)
    server, answers = make_server(Starlette(), close_within_s=1.0), list[bytes]()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    for request in requests:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(request)
        try:
            async with asyncio.timeout(60):
                answers.append(await reader.read())
        except ConnectionResetError:  # it was cut off while it still spoke
            answers.append(b"")
        writer.close()
    server.should_exit = True
    await serving
    listener.close()
    return answers


async def test_what_strangers_send_is_bounded_before_it_is_a_request_and_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        endless, garbage, upgrade = await said_to(
            (
                b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (4 << 20),
                b"garbage\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n",
            )
        )
    assert endless.startswith(b"HTTP/1.1 400") or not endless
    assert garbage.startswith(b"HTTP/1.1 400")
    assert upgrade.startswith(b"HTTP/1.1 404")
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []
