"""What axe-core finds wrong with a page, by the criteria of WCAG 2 (A and AA)."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

from playwright.sync_api import Page

WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def violations(page: Page) -> list[str]:
    """Each rule that the page breaks as it stands, with the elements that break it and why."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
    found: Any = page.evaluate(
        "(tags) => axe.run({ runOnly: { type: 'tag', values: tags }, resultTypes: ['violations'] })", WCAG
    )
    assert found["passes"]  # it has looked
    return [
        f"{rule['id']}: {' '.join(node['target'])}: {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def violations_in_both_themes(page: Page) -> list[str]:
    found = list[str]()
    for theme in THEMES:
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")  # colours that are on their way are none yet
        found += [f"{page.url} {theme}: {each}" for each in violations(page)]
    return found
