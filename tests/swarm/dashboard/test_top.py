"""Frames of `swarm top`: what is drawn from what the core knows, whatever strangers call themselves."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from swarm.cli.top import frame
from tests.helpers.crowd import ADAPTERS, HOSTILE, Crowd

T0 = 1_750_000_000.0


def drawn(crowd: Crowd, now_s: float, *, height: int | None = None, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
    console.print(frame(crowd.core, now_s, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_frame_says_who_is_there_how_fast_and_what_is_missing() -> None:
    crowd = Crowd(200, now_s=T0)
    text = "\n".join(drawn(crowd, T0 + 2))
    assert "network crowd · 200 online" in text
    assert "crowd-8b-instruct" in text
    assert "you → " in text
    assert "tokens/s for one" in text
    assert "read 2 s ago" in text
    hosted = re.compile(rf"{ADAPTERS[0]} ×\d+( INCOMPLETE)?,")
    assert (found := hosted.search(text)) is not None
    assert found[1] is None
    crowd.gap(T0 + 3)
    crowd.look(T0 + 3)
    crowd.publish(T0 + 3)
    text = "\n".join(drawn(crowd, T0 + 3))
    assert "INCOMPLETE: nobody serves" in text
    assert (found := hosted.search(text)) is not None
    assert found[1]
    assert "!" in next(line for line in text.splitlines() if line.startswith("blocks "))
    assert "paused" in text


def test_a_frame_fits_into_the_terminal() -> None:
    crowd = Crowd(300, now_s=T0)
    for second in range(1, 30):
        crowd.second(T0 + second, churn=1)
    for height, width in ((16, 60), (24, 80), (50, 120)):
        lines = drawn(crowd, T0 + 30, height=height, width=width)
        assert " more: " in "\n".join(lines)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width


def test_names_are_never_markup() -> None:
    crowd = Crowd(100, now_s=T0)
    peer = next(iter(crowd.members.values()))
    peer.record = replace(peer.record, name="[red]x[/] [/bold]")
    crowd.look(T0 + 1)
    crowd.publish(T0 + 1)
    text = "\n".join(drawn(crowd, T0 + 1))
    assert "[red]x[/] [/bold]" in text
    assert HOSTILE[0][:20] in text


def test_before_the_first_look_it_says_so() -> None:
    crowd = Crowd(0, now_s=T0)
    crowd.core.read_at_s = None
    crowd.core.failed("no way into the network: [b]the entry nodes are down")
    text = "\n".join(drawn(crowd, T0))
    assert "no peers · not read yet" in text
    assert "[b]the entry nodes are down" in text
