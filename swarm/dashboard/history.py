"""Hours and days of a swarm in one SQLite file: samples of each model, and events. Bounded by age and rows.

Owns the file and its schema. A file that is damaged, or of another version, is set aside under another name, because a
dashboard without its past is better than none. One thread at a time: whoever shares it brings a lock.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from peers.model.storage import cache_folder
from swarm.dashboard.schemas import Event, EventKind, HistoryPoint, ModelView, State

logger = logging.getLogger(__name__)

SAMPLE_S: Final = 15.0
"""Between two samples of a model."""
MAX_AGE_S: Final = 7 * 86400.0
MAX_SAMPLES: Final = 400_000
"""Ten models for a week: some 40 MB."""
MAX_EVENTS: Final = 50_000
_VERSION: Final = 1
_BUSY_S: Final = 2.0
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS samples (
    network TEXT NOT NULL, model TEXT NOT NULL, at_s REAL NOT NULL, online INTEGER NOT NULL, sessions INTEGER NOT NULL,
    queued INTEGER NOT NULL, free REAL NOT NULL, stream REAL, total REAL NOT NULL, replication INTEGER NOT NULL,
    gaps INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS samples_of ON samples (network, model, at_s);
CREATE INDEX IF NOT EXISTS samples_at ON samples (at_s);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, network TEXT NOT NULL, at_s REAL NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    peer TEXT, text TEXT NOT NULL, whole TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_at ON events (at_s);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventQuery:
    kinds: Sequence[EventKind] = ()
    model: str | None = None
    peer: str | None = None
    text: str = ""
    before: int | None = None
    limit: int = 100


def default_file(network: str) -> Path:
    """Beside what else is kept for this user."""
    return cache_folder() / f"dashboard-{network}.sqlite3"


class History:
    """Of one network; a file may hold several, and is one dashboard's at a time."""

    def __init__(self, connection: sqlite3.Connection, network: str) -> None:
        self._db = connection
        self._network = network
        self._lock = threading.Lock()
        self._db.executescript(_TABLES)
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    @classmethod
    def open(cls, file: Path | None, network: str) -> Self:
        """Of `file`, made where there is none; in memory where that is None or, with a warning, cannot be used."""
        connection = None if file is None else _connect(file) or _connect(file)  # again after one was set aside
        if file is not None and connection is None:
            logger.warning("the history is kept in memory only")
        return cls(connection or _opened(":memory:"), network)

    @property
    def last_event_id(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])

    def add(self, models: Iterable[ModelView], events: Iterable[Event], now_s: float) -> None:
        """Keep one sample of each model, and what happened; forget what is too old or too much."""
        samples = [
            (
                self._network,
                view.model_id,
                now_s,
                view.states[State.ONLINE],
                view.sessions,
                min(view.queued_tokens, 1 << 53),
                float(view.free_tokens),
                view.stream_tokens_per_s,
                view.total_tokens_per_s,
                view.replication,
                sum(end - start for start, end in view.gaps),
            )
            for view in models
        ]
        rows = [
            (
                e.id,
                self._network,
                e.at_s,
                e.kind.value,
                e.model_id,
                e.peer_id,
                f"{e.text} {e.peer_id or ''}",
                e.model_dump_json(),
            )
            for e in events
        ]
        with self._lock, self._db:
            self._db.execute("BEGIN")
            self._db.executemany(f"INSERT INTO samples VALUES ({_marks(11)})", samples)
            self._db.executemany(f"INSERT OR IGNORE INTO events VALUES ({_marks(8)})", rows)
            for table, most in (("samples", MAX_SAMPLES), ("events", MAX_EVENTS)):
                self._db.execute(f"DELETE FROM {table} WHERE at_s < ?", (now_s - MAX_AGE_S,))
                self._db.execute(f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", (most,))

    def events(self, query: EventQuery) -> list[Event]:
        """The newest that match, newest first; `limit` at most."""
        where, parameters = ["network = ?"], list[object]([self._network])
        if query.kinds:
            where.append(f"kind IN ({_marks(len(query.kinds))})")
            parameters += [kind.value for kind in query.kinds]
        for column, value in (("model", query.model), ("peer", query.peer)):
            if value is not None:
                where.append(f"{column} = ?")
                parameters.append(value)
        for word in query.text.split():
            where.append("text LIKE ? ESCAPE '\\'")
            parameters.append(f"%{_escaped(word)}%")
        if query.before is not None:
            where.append("id < ?")
            parameters.append(query.before)
        asked = f"SELECT whole FROM events WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"
        with self._lock:
            rows = self._db.execute(asked, (*parameters, query.limit)).fetchall()
        return [Event.model_validate_json(whole) for (whole,) in rows]

    def points(self, model: str, *, since_s: float, interval_s: float) -> list[HistoryPoint]:
        """Oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT cast((at_s - ?) / ? AS INTEGER) AS at, avg(online), avg(sessions), avg(queued), avg(free), "
                "avg(stream), avg(total), min(replication), max(gaps) FROM samples "
                "WHERE network = ? AND model = ? AND at_s >= ? GROUP BY at ORDER BY at",
                (since_s, interval_s, self._network, model, since_s),
            ).fetchall()
        return [
            HistoryPoint(
                at_s=round(since_s + at * interval_s, 3),
                online=online,
                sessions=sessions,
                queued_tokens=queued,
                free_tokens=free,
                stream_tokens_per_s=stream,
                total_tokens_per_s=total,
                replication=replication,
                gap_blocks=gaps,
            )
            for at, online, sessions, queued, free, stream, total, replication, gaps in rows
        ]

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _opened(name: str | Path) -> sqlite3.Connection:
    return sqlite3.connect(name, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)


def _connect(file: Path) -> sqlite3.Connection | None:
    """None where it cannot be used, and where it was set aside."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = _opened(file)
    except (OSError, sqlite3.OperationalError) as error:
        logger.warning("%s cannot be opened: %s", file, error)
        return None
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # two dashboards would count everything twice
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        (sound,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok" or found not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it has version {found}" if sound == "ok" else sound)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        connection.close()
        logger.warning("%s cannot be used, perhaps because another dashboard does: %s", file, error)
        return None
    except sqlite3.DatabaseError as error:
        connection.close()
        _set_aside(file, error)
        return None
    return connection


def _set_aside(file: Path, error: sqlite3.DatabaseError) -> None:
    aside = file.with_name(f"{file.name}.damaged")
    logger.warning("%s cannot be read (%s): it is kept as %s, and a new one is begun", file, error, aside.name)
    try:
        file.replace(aside)
        for suffix in ("-wal", "-shm"):
            file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
    except OSError as problem:
        logger.warning("%s cannot be set aside: %s", file, problem)


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
