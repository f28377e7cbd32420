"""What every test of the runtime needs."""

from __future__ import annotations

import asyncio

asyncio.set_event_loop(None)  # or pytest-asyncio asks for the current loop, so makes one, and nobody closes it
