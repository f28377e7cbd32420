"""A week in one file: bounded, kept over restarts, and never a reason not to start."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest

from swarm.dashboard import history as module
from swarm.dashboard.history import MAX_AGE_S, EventQuery, History, default_file
from swarm.dashboard.schemas import Event, EventKind
from tests.helpers.crowd import MODEL, Crowd

T0 = 1_750_000_000.0


def event(
    number: int, text: str = "", *, kind: EventKind = EventKind.JOINED, peer: str = "p", at_s: float = T0
) -> Event:
    return Event(
        id=number, at_s=at_s, kind=kind, model_id=MODEL.hex, model_name="m", peer_id=peer, spans=[(0, 4)], text=text
    )


def ids(history: History, **query: object) -> list[int]:
    return [found.id for found in history.events(EventQuery(**query))]  # type: ignore[arg-type]


def test_samples_and_events_survive_a_restart(tmp_path: Path) -> None:
    file, crowd = tmp_path / "new folder" / "h.sqlite3", Crowd(100, now_s=T0)
    first = History.open(file, "crowd")
    for second in range(0, 120, 15):
        first.add(crowd.core.models, [event(second + 1, f"at {second}")], T0 + second)
    first.close()
    again = History.open(file, "crowd")
    assert again.last_event_id == 106
    assert ids(again, limit=2) == [106, 91]
    points = again.points(MODEL.hex, since_s=T0, interval_s=60.0)
    assert [point.at_s for point in points] == [T0, T0 + 60]
    assert points[0].online == 90.0
    assert points[0].total_tokens_per_s > 0
    assert History.open(None, "crowd").points(MODEL.hex, since_s=T0, interval_s=60.0) == []
    again.close()


def test_networks_that_share_a_file_do_not_see_each_other(tmp_path: Path) -> None:
    one = History.open(tmp_path / "h", "one")
    one.add([], [event(1)], T0)
    one.close()
    other = History.open(tmp_path / "h", "other")
    assert ids(other) == []
    assert other.last_event_id == 1, "ids are the file's"
    other.close()


def test_events_are_found_by_kind_peer_and_words_that_mean_themselves(tmp_path: Path) -> None:
    history = History.open(None, "n")
    history.add(
        [],
        [
            event(1, "100% of it", kind=EventKind.LOST, peer="12D3Alice"),
            event(2, "a_b", peer="12D3Bob"),
            event(3, "axb '; DROP TABLE events; --"),
        ],
        T0,
    )
    assert ids(history) == [3, 2, 1]
    assert ids(history, kinds=[EventKind.LOST]) == [1]
    assert ids(history, peer="12D3Bob") == [2]
    assert ids(history, text="100% it") == [1]
    assert ids(history, text="a_b") == [2]
    assert ids(history, text="%") == [1]
    assert ids(history, text="12d3alice") == [1]
    assert ids(history, text="'; DROP") == [3]
    assert ids(history, before=3, limit=1) == [2]
    assert ids(history, model="other") == []


def test_what_is_too_old_or_too_much_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 5)
    monkeypatch.setattr(module, "MAX_SAMPLES", 7)
    history, crowd = History.open(None, "n"), Crowd(3, now_s=T0)
    for number in range(1, 21):
        history.add(crowd.core.models, [event(number)], T0 + number)
    assert ids(history) == [20, 19, 18, 17, 16]
    points = history.points(MODEL.hex, since_s=T0, interval_s=1.0)
    assert [point.at_s for point in points] == [T0 + number for number in range(14, 21)]
    history.add([], [], T0 + 19 + MAX_AGE_S)
    assert len(history.points(MODEL.hex, since_s=T0, interval_s=1.0)) == 2
    history.add([], [], T0 + 1000 + MAX_AGE_S)
    assert ids(history) == []


@pytest.mark.parametrize("damage", ["rubbish", "torn", "version"])
def test_a_damaged_file_is_set_aside_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "h.sqlite3"
    before = History.open(file, "n")
    before.add([], [event(number, "x" * 200) for number in range(1, 200)], T0)
    before.close()
    if damage == "rubbish":
        file.write_bytes(b"this is no database" * 100)
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:-9000])
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    with caplog.at_level(logging.WARNING):
        history = History.open(file, "n")
    assert "a new one is begun" in caplog.text
    assert (tmp_path / "h.sqlite3.damaged").exists()
    history.add([], [event(1)], T0)
    history.close()
    kept = History.open(file, "n")
    assert ids(kept) == [1]
    kept.close()


def test_a_file_that_another_dashboard_uses_is_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.01)
    first = History.open(tmp_path / "h", "n")
    first.add([], [event(1)], T0)
    second = History.open(tmp_path / "h", "n")
    assert "another dashboard" in caplog.text
    assert "in memory only" in caplog.text
    second.add([], [event(2)], T0)
    assert (ids(first), ids(second)) == ([1], [2])
    first.close()
    second.close()


def test_a_file_that_cannot_be_made_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    History.open(tmp_path / "file" / "h", "n").close()
    assert "in memory only" in caplog.text
    assert default_file("hive").name == "dashboard-hive.sqlite3"
