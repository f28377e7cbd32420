"""Request bodies with a bound on size and time, before anything else looks at them.

Owns the reading of bodies; what is said to one who sends too much is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

READ_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""


class BoundedBodies:
    """ASGI middleware. `refuse(status, sentence)` answers a body that is too long (413) or too slow (408)."""

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, refuse: Callable[[int, str], Response], timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._refuse = refuse
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_bytes:
                        response = self._refuse(413, f"a request has at most {self._max_bytes} bytes")
                        await response(scope, receive, send)
                        return
        except TimeoutError:
            response = self._refuse(408, f"a request's body must arrive within {self._timeout_s:.0f} s")
            await response(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)
