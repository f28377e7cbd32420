"""Server-sent events to a reader who may leave, or stop reading, at any moment."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

PING_S = 15
"""A stream that has nothing to say sends a comment so often, so that nobody between takes it for dead."""


class EventStream(EventSourceResponse):
    """Sends events that are bytes already, and calls `left` however it ends, also before the first one. A reader that
    takes nothing for `send_timeout_s` has gone."""

    def __init__(self, events: AsyncIterator[bytes], left: Callable[[], None], *, send_timeout_s: float) -> None:
        super().__init__(events, ping=PING_S, sep="\n", send_timeout=send_timeout_s)
        self._left = left
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("a reader took nothing for %.0f s and was left", self._send_timeout_s)
        finally:
            self._left()
