"""The event loop of a node: uvloop's, where there is one, because a token passes through several of them.

hivemind brings uvloop wherever it runs. What is measured in a loop needs a better clock than uvloop's own, which stands
still between two polls and counts milliseconds.
"""

from __future__ import annotations

import asyncio
import time


def new_event_loop() -> asyncio.AbstractEventLoop:
    """For `asyncio.Runner(loop_factory=…)`, or a thread that runs it by itself."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()

    class Loop(uvloop.Loop):
        time = staticmethod(time.monotonic)

    return Loop()
