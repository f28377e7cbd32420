"""What holds for every trace that we write."""

from __future__ import annotations

import json
from typing import Any


def check_trace(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The slices of each track, by its name; on one track they nest or follow each other."""
    events = json.loads(json.dumps(trace))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tracks: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    assert len(tracks) == len(names)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    for slices in tracks.values():
        stack: list[int] = []
        for event in slices:
            start, end = event["ts"], event["ts"] + event["dur"]
            assert event["dur"] >= 0
            while stack and stack[-1] <= start and not end <= stack[-1]:
                stack.pop()
            assert not stack or end <= stack[-1]
            stack.append(end)
    return tracks
