"""Both pages in one real browser, over a real swarm: an answer, and a peer that comes, leaves, comes back and dies."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from playwright.sync_api import Page, expect
from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.testing import LocalSwarm
from tests.helpers.browser import chromium, visit
from tests.integration.conftest import MODEL, Commands, Greedy

QUESTION = "What is the capital of France?"
SEEN_MS = 60_000
"""Until something must be seen, on a busy machine; what it takes is written out."""


def test_the_pages_over_a_real_swarm(
    command: Commands,
    swarm: LocalSwarm,
    tokenizer: PreTrainedTokenizerBase,
    greedy: Greedy,
    record_property: Callable[[str, object], None],
) -> None:
    options = ("--invite", swarm.invite, "--port", "0", "--json")
    with (
        command.until_interrupted("gateway", MODEL, "--dtype", "float32", *options) as gateway,
        command.until_interrupted("dashboard", *options) as dashboard,
        chromium() as browser,
    ):
        with visit(browser, json.loads(gateway.stdout.readline())["url"]) as page:
            ids = greedy(tuple(encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])), 8, ending=True)
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Temperature").fill("0")
            page.get_by_label("Most tokens").fill("8")
            page.get_by_role("button", name="Save").click()
            page.get_by_label("Your message").fill(QUESTION)
            page.keyboard.press("Enter")
            answer = page.get_by_label("The model")
            expect(answer).to_contain_text(tokenizer.decode(ids, skip_special_tokens=True), timeout=SEEN_MS)
            expect(answer).to_contain_text("tokens/s")
            hops = page.locator(".hop")
            expect(hops).to_have_count(len(swarm.peers))
            for at, peer in enumerate(swarm.peers):
                expect(hops.nth(at)).to_contain_text(peer.peer_id[-8:])

        with visit(browser, json.loads(dashboard.stdout.readline())["url"]) as page:
            watch_a_peer(page, swarm, record_property)


def watch_a_peer(page: Page, swarm: LocalSwarm, record: Callable[[str, object], None]) -> None:
    block = page.locator(".strip li").first
    expect(block).to_have_attribute("aria-label", "Block 0: a single holder", timeout=SEEN_MS)
    peer = swarm.add_peer((0, 1))
    try:
        expect(block).to_have_attribute("aria-label", "Block 0: 2 holders", timeout=SEEN_MS)
        events = page.locator(".event").filter(has_text=peer.peer_id[-6:])
        for kind, happens in (("left", peer.terminate), ("returned", peer.restart), ("lost", peer.kill)):
            happens()
            begun_s = time.monotonic()
            expect(events.first).to_contain_text(kind, timeout=SEEN_MS)
            expect(block).to_have_attribute(
                "aria-label", f"Block 0: {'2 holders' if kind == 'returned' else 'a single holder'}", timeout=SEEN_MS
            )
            took_s = time.monotonic() - begun_s
            record(f"seconds until “{kind}” is seen", round(took_s, 2))
            sys.stdout.write(f"“{kind}” is seen after {took_s:.1f} s\n")
    finally:
        peer.close()
        swarm.peers.remove(peer)
