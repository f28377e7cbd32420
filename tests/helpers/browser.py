"""A real Chromium for tests of our pages: what it says on its console and asks of others is part of the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect, sync_playwright

QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SEEN_MS = 60_000
"""Until something must be there, on a busy machine."""
SYSTEM = ("chromium", "chromium-browser", "google-chrome")


def executable(playwright: Playwright) -> str | None:
    """The system's Chromium, or else the one that Playwright fetched; None where there is neither."""
    for name in SYSTEM:
        if (found := shutil.which(name)) is not None:
            return found
    fetched = playwright.chromium.executable_path
    return fetched if Path(fetched).exists() else None


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none. While it is open, no other event loop runs in this thread: end it with the
    module."""
    with sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            pytest.skip("there is no Chromium; `scripts/browser` installs one, or says how")
        expect.set_options(timeout=SEEN_MS)
        root = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET, *root], timeout=SEEN_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, *, width: int = 1280, height: int = 800, refused: bool = False) -> Iterator[Page]:
    """One visitor with nothing stored. Afterwards: no request went to another host, and nothing is on the console but,
    where the server is to refuse something, what the browser itself writes about that."""
    host, strangers, complaints = urlsplit(url).netloc, list[str](), list[str]()

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.text} {message.location}")

    context = browser.new_context(viewport={"width": width, "height": height})
    try:
        page = context.new_page()
        page.set_default_timeout(SEEN_MS)
        page.on("console", said)
        page.on("pageerror", lambda error: strangers.append(f"uncaught: {error.message}"))
        page.on("request", lambda request: urlsplit(request.url).netloc == host or strangers.append(request.url))
        page.goto(url)
        yield page
        assert strangers == []
        assert [text for text in complaints if not (refused and "Failed to load resource" in text)] == []
    finally:
        context.close()
