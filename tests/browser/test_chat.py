"""The chat page in a real browser: a real gateway, real peers in memory, a tiny model that writes without end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from swarm.gateway.keys import Account, hash_key
from tests.helpers.accessibility import violations, violations_in_both_themes
from tests.helpers.browser import SEEN_MS, chromium, visit
from tests.helpers.gateway import GatewayWorld, serving
from tests.helpers.memory_swarm import impatient

KEY = "a-key-for-the-page-only"
LATENCY_S = 0.02
"""Between peers. An answer to the end of the context takes two minutes, in case the browser is late."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[GatewayWorld]:
    world = GatewayWorld(tmp_path_factory.mktemp("gateway"), latency_s=LATENCY_S)
    yield world
    world.close()


@pytest.fixture(scope="module")
def url(world: GatewayWorld) -> Iterator[str]:
    with serving(world.served) as gateway:
        yield gateway.url


def say(page: Page, text: str) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def settings(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Save").click()


def endless(page: Page) -> None:
    """Greedily the model never ends by itself."""
    settings(page, Temperature="0")


def told(page: Page) -> list[dict[str, Any]]:
    """The messages of the newest conversation, as the browser keeps them."""
    kept = page.evaluate("Object.entries(localStorage).filter(([key]) => key.startsWith('hiveswarm.chat.'))")
    conversations = [json.loads(value) for _, value in kept]
    return list(max(conversations, key=lambda each: each["at"])["messages"])


def says(page: Page, *expected: str) -> None:
    """Soon, these: the page is drawn before what it shows is kept, and a frame after it has changed."""
    deadline_s = time.monotonic() + SEEN_MS / 1000
    while [message["content"] for message in told(page)] != [*expected] and time.monotonic() < deadline_s:
        page.wait_for_timeout(50)
    assert [message["content"] for message in told(page)] == [*expected]


def ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_an_answer_streams_shows_its_route_stops_and_is_kept(browser: Browser, url: str, world: GatewayWorld) -> None:
    with visit(browser, url) as page:
        expect(page.get_by_label("Your message")).to_be_focused()
        endless(page)
        say(page, "Tell me everything")
        answer = page.get_by_label("The model")
        expect(answer).to_contain_text("tokens/s")
        for peer in world.swarm.peers:
            expect(page.locator("#route")).to_contain_text(peer._key.peer_id[-8:])
        expect(page.locator("#route")).to_contain_text("Where the time went")
        expect(page.locator("#columns")).to_be_visible()
        page.keyboard.press("Escape")
        expect(answer).to_contain_text("Stopped.")
        expect(page.locator("#announcer")).to_contain_text("Stopped.")
        ended(page)
        whole = told(page)[1]["content"]
        assert whole

        page.keyboard.press("Control+k")
        expect(page.get_by_role("heading", name="Ask the swarm")).to_be_visible()
        page.reload()
        page.get_by_role("button", name="Tell me everything", exact=True).click()
        expect(answer).to_contain_text("Stopped.")
        assert told(page)[1]["content"] == whole
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete").click()
        expect(page.get_by_role("button", name="Tell me everything", exact=True)).to_have_count(0)


def test_a_message_is_changed_and_an_answer_asked_for_again(browser: Browser, url: str, world: GatewayWorld) -> None:
    def expected(text: str) -> str:
        turns = f"<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return world.text(turns, 12)

    with visit(browser, url) as page:
        settings(page, System_prompt_of_this_conversation="Be brief", Temperature="0", Most_tokens="12")
        say(page, "Hello")
        expect(page.get_by_label("The model")).to_contain_text("Ended at the limit of tokens.")
        says(page, "Hello", expected("Hello"))

        with page.expect_request(lambda request: request.method == "POST"):  # what was kept is gone by then
            page.get_by_role("button", name="Answer again").click()
        says(page, "Hello", expected("Hello"))
        ended(page)
        expect(page.get_by_label("The model")).to_contain_text("12 tokens")

        page.get_by_label("Your message").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.type(" there")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you")
        page.keyboard.press("Enter")
        changed = "Hello there\nyou"
        says(page, changed, expected(changed))
        expect(page.get_by_label("You", exact=True)).to_contain_text("you")
        expect(page.get_by_label("The model")).to_contain_text("12 tokens")


def test_the_chosen_model_answers(browser: Browser, world: GatewayWorld) -> None:
    asked: list[Any] = []
    with serving(world.served, names=["one", "another"]) as gateway, visit(browser, gateway.url) as page:
        page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
        settings(page, Most_tokens="4")
        page.get_by_label("Model", exact=True).select_option("another")
        say(page, "Hello")
        expect(page.get_by_label("The model")).to_contain_text("4 tokens")
    assert [body["model"] for body in asked] == ["another"]


def test_what_a_model_writes_is_shown_and_does_nothing(browser: Browser, url: str) -> None:
    written = """
<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>

![a picture](https://elsewhere.example/p.png) [bad](javascript:alert(1)) [good](https://elsewhere.example/)

| a | b |
|---|---|
| **1** | <b style="color:red">2</b> |

```html
<p>code</p>
```
"""
    with visit(browser, url) as page:
        page.evaluate(
            """async (text) => {
                const { show } = await import("./assets/chat/markdown.js");
                const element = document.createElement("div");
                element.id = "written";
                document.body.append(element);
                for (let end = 1; end <= text.length; end += 7) show(element, text.slice(0, end));
                show(element, text);
            }""",
            written,
        )
        shown = page.locator("#written")
        expect(shown).to_contain_text("<img src=x onerror=")
        expect(shown).to_contain_text("<p>code</p>")
        assert shown.locator("img, script, [style], [onerror]").count() == 0
        assert shown.locator("td strong").count() == 1
        links = shown.locator("a")
        assert [links.nth(at).get_attribute("href") for at in range(links.count())] == [
            "https://elsewhere.example/p.png",
            None,
            "https://elsewhere.example/",
        ]
        assert "noopener" in str(links.last.get_attribute("rel"))
        assert page.title() == "Chat – hiveswarm"


def test_the_page_is_for_everybody(browser: Browser, url: str) -> None:
    """Nothing that axe-core knows to be against WCAG 2 A or AA, dark and light; and narrow, with the same colours."""
    with visit(browser, url) as page:
        expect(page.get_by_role("heading", name="Ask the swarm")).to_be_visible()
        found = violations_in_both_themes(page)
        page.get_by_role("button", name="Settings").click()
        found += violations_in_both_themes(page)
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Save").click()
        say(page, "Hello")
        expect(page.get_by_role("heading", name="Where the time went")).to_be_visible()
        found += violations(page)
        page.get_by_role("button", name="Stop").click()
        ended(page)
        found += violations_in_both_themes(page)
        page.set_viewport_size({"width": 390, "height": 800})
        found += violations(page)
        page.get_by_role("button", name="Route of the tokens").click()
        expect(page.get_by_role("heading", name="Where the time went")).to_be_visible()
        found += violations(page)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Conversations").click()
        found += violations(page)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Settings").click()
        found += violations(page)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Edit this message").click()
        found += violations(page)
        assert found == []


def test_what_is_refused_is_said_in_words(browser: Browser, world: GatewayWorld) -> None:
    account = Account(name="somebody", digest=hash_key(KEY), requests_per_minute=0.1)
    with ExitStack() as visiting:
        with serving(world.served, accounts=[account]) as gateway:
            page = visiting.enter_context(visit(browser, gateway.url, refused=True))
            expect(page.get_by_role("alert")).to_contain_text("needs an API key")
            settings(page, API_key=KEY, Most_tokens="4")
            say(page, "One")
            expect(page.get_by_label("The model")).to_have_count(1)
            ended(page)
            say(page, "Two")
            expect(page.get_by_role("alert")).to_contain_text("asked too often")
            expect(page.get_by_role("alert")).to_contain_text("wait")
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_a_message_that_is_too_long_is_refused_with_what_there_is_room_for(browser: Browser, url: str) -> None:
    with visit(browser, url, refused=True) as page:
        say(page, "x" * 3000)
        expect(page.get_by_role("alert")).to_contain_text("The gateway refuses this: the prompt has 3")
        expect(page.get_by_role("alert")).to_contain_text("the model's context has 2048")


def test_a_gap_is_said_in_a_sentence_and_the_peers_that_failed_in_details(browser: Browser, tmp_path: Path) -> None:
    world = GatewayWorld(tmp_path, latency_s=LATENCY_S)
    try:
        with impatient(), serving(world.served) as gateway, visit(browser, gateway.url) as page:
            endless(page)
            say(page, "Go on until the end")
            expect(page.get_by_label("The model")).to_contain_text("tokens/s")
            last = world.served.model.route.hops[-1].peer_id
            world.swarm.kill_peer(last)
            alert = page.get_by_role("alert")
            expect(alert.get_by_role("paragraph").first).to_have_text(
                re.compile(r"The answer broke off: no route for model \w+: blocks 2:4 are missing")
            )
            details = alert.get_by_text(last)
            expect(details).to_be_hidden()
            alert.get_by_text("Details").click()
            expect(details).to_be_visible()
            assert violations(page) == []
    finally:
        world.close()


def test_an_answer_that_waits_for_peers_says_so_and_goes_on_by_itself(browser: Browser, tmp_path: Path) -> None:
    world = GatewayWorld(tmp_path, latency_s=LATENCY_S)
    try:
        with serving(world.served) as gateway, visit(browser, gateway.url) as page:
            endless(page)
            say(page, "Go on until the end")
            answer = page.get_by_label("The model")
            expect(answer).to_contain_text("tokens/s")
            world.swarm.kill_peer(world.served.model.route.hops[-1].peer_id)
            expect(answer).to_contain_text(re.compile(r"The answer waits for peers.*blocks 2:4 are missing"))
            expect(page.locator("#announcer")).to_contain_text("Waiting: no route")
            assert violations(page) == []
            before = len(told(page)[1]["content"])
            world.swarm.add_peer(2, 4)
            expect(answer).not_to_contain_text("The answer waits for peers")
            page.get_by_role("button", name="Stop").click()
            ended(page)
            assert len(told(page)[1]["content"]) > before
    finally:
        world.close()


def test_an_answer_that_breaks_off_can_be_asked_for_again_when_the_gateway_is_back(
    browser: Browser, world: GatewayWorld
) -> None:
    """The page says that it reconnects, and notices by itself that the gateway is there again."""
    with ExitStack() as visiting:
        with serving(world.served, drain_s=0.1) as gateway:
            page = visiting.enter_context(visit(browser, gateway.url, width=390, refused=True))
            endless(page)
            say(page, "Go on until the end")
            expect(page.get_by_label("The model")).to_contain_text("tokens/s")
        expect(page.get_by_role("alert")).to_contain_text("The answer broke off")
        expect(page.get_by_role("button", name="Try again")).to_be_enabled()
        expect(page.get_by_role("status")).to_contain_text("reconnecting")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert told(page)[1]["content"]
        with serving(world.served, drain_s=0.1, port=int(gateway.url.rpartition(":")[2])):
            expect(page.get_by_role("status")).to_have_text("")
            expect(page.locator("#announcer")).to_contain_text("The gateway is back.")
            page.get_by_role("button", name="Try again").click()
            expect(page.get_by_label("The model")).to_contain_text("tokens/s")
            expect(page.get_by_role("alert")).to_have_count(0)
            page.get_by_role("button", name="Stop").click()
            ended(page)


def test_the_description_of_the_api_is_a_page_too(browser: Browser, url: str) -> None:
    with visit(browser, f"{url}/docs") as page:
        expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()


def test_a_phone_shows_all_of_it(browser: Browser, url: str) -> None:
    with visit(browser, url, width=390, height=844) as page:
        endless(page)
        say(page, "Hello")
        expect(page.get_by_label("The model")).to_contain_text("tokens/s")
        page.get_by_role("button", name="Stop").click()
        ended(page)
        page.get_by_role("button", name="Route of the tokens").click()
        expect(page.get_by_role("heading", name="Where the time went")).to_be_visible()
        assert page.evaluate(  # also when nothing more comes
            """new Promise((told) => requestAnimationFrame(() => requestAnimationFrame(() => {
                const canvas = document.querySelector("#columns");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                told(data.some(Boolean));
            })))"""
        )
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New chat")).to_be_visible()
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_role("heading", name="Ask the swarm")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
