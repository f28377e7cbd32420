"""looptime asks for the current event loop before each test; unless it was told that there is none, asyncio makes one
up, nobody closes it, and its ResourceWarning fails whatever test is running when it is collected."""

import asyncio

asyncio.set_event_loop(None)
