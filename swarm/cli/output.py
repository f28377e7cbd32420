"""What people read: errors in one line with a hint, logs, progress bars, events.

Results go to stdout, the rest to stderr. Knows the shape of errors and events, and no command.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from routing.errors import SwarmError
from swarm.cli import signals
from swarm.errors import UnusableFile

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from peers.host.events import Event

logger = logging.getLogger(__name__)

OUR_LOGGERS = ("routing", "peers", "swarm")
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
"""What a write or an open says of the machine, also where it does not say which file."""


@contextmanager
def command(*, verbose: int, debug: bool) -> Iterator[None]:
    """Run one command: logging before, errors and interruptions turned into lines and exit codes after.

    A SwarmError exits with 1, also when a task group wrapped it, and so does a file that cannot be used. Anything else
    is a defect, and shows its traceback.
    """
    configure_logging(verbose)
    try:
        yield
    except signals.Interrupted as interruption:
        if sys.stderr.isatty():
            say("")
        signals.leave(128 + interruption.number)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        raise typer.Exit(1) from None
    except (SwarmError, OSError, BaseExceptionGroup) as error:
        known = error_in(error)
        if known is None or debug:
            raise
        print_error(known)
        raise typer.Exit(1) from None


def error_in(error: BaseException) -> SwarmError | None:
    """The SwarmError that `error` is or, of a file that cannot be used, amounts to; of a group of nothing else, that
    with which it begins."""
    if isinstance(error, BaseExceptionGroup):
        found = [error_in(part) for part in error.exceptions]
        return found[0] if all(found) else None
    if isinstance(error, OSError) and (error.filename is not None or error.errno in OUT_OF_ROOM):
        which = "" if error.filename is None else f"{error.filename}: "
        return UnusableFile(f"{which}{error.strerror}")
    return error if isinstance(error, SwarmError) else None


def print_error(error: SwarmError) -> None:
    say(f"{typer.style('error:', fg='red', bold=True)} {one_line(str(error))}")
    if error.hint:
        say(f"{typer.style('hint:', fg='cyan', bold=True)} {one_line(error.hint)}")


def one_line(text: str) -> str:
    return " ".join(text.split())


def say(text: str) -> None:
    """One line for a person, on stderr; colours only where it is a terminal."""
    typer.echo(text, err=True)


def write(text: str) -> None:
    """A piece of a result to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def configure_logging(verbose: int) -> None:
    """0: warnings; 1: our own lifecycle; 2: every step of ours, and what libraries say."""
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "INFO" if verbose > 1 else "ERROR")
    if verbose < 2:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose > 1 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


class Bars:
    """A `peers.model.progress.Progress` drawn on stderr; where that is no terminal, it only logs what begins."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None

    def start(self, label: str, total: int) -> None:
        if not sys.stderr.isatty():
            logger.info("%s (%d MB)", label, total // 1_000_000)
            return
        self.done()
        self._bars = _bars()
        self._bars.add_task(label, total=total or None)
        self._bars.start()

    def advance(self, n: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], n)

    def done(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.done()


def _bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def event_writer(*, as_json: bool, describe: Callable[[Event], str]) -> Callable[[Event], None]:
    """Writes each event to stdout at once: as one JSON object per line, or as `describe` words it."""

    def write(event: Event) -> None:
        text = json.dumps({"event": event.kind, **event.fields}) if as_json else describe(event)
        if text:
            typer.echo(text)

    return write
