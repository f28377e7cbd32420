"""What an experiment is, what it writes down, and the table and JSON that come of it."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Final, TypeVar

import torch
from transformers import AutoModelForCausalLM

from swarm.session.remote import Resilience
from swarm.testing import model_folder
from tests.lab.network import ROOT, Network
from tests.lab.swarms import generate

MODEL: Final = "smollm2-135m-instruct"
SPANS: Final = ((0, 10), (10, 20), (20, 30))
HIDDEN_BYTES: Final = 576 * 4
"""One position on the wire in float32."""
TOKEN_IDS: Final = (1_000, 40_000)
"""Prompts are drawn from these, so that no peer knows the beginning of one from another."""
HANG_S: Final = 180.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bar:
    """What must be shown."""

    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Notebook:
    """One run of one experiment."""

    experiment: str
    seed: int
    runs: int
    short: bool
    say: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    first: int = 0
    """Number of the first run."""
    allowed_s: float = math.inf
    """Since the start; then no further run begins."""
    resilience: Resilience = "replay"
    """Of users, where an experiment looks at it."""
    rng: random.Random = field(init=False)
    commit: str = field(init=False)
    """The code that is measured; empty outside a git checkout."""
    _local: Any = None
    _local_rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.experiment} {self.seed}")
        git = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        self.commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()

    def numbers(self) -> Iterator[int]:
        """Of the runs, as long as there is time. Each draws by its own number, so a series may be made in parts."""
        for number in range(self.first, self.first + self.runs):
            if self.rows and time.monotonic() - self.started_s > self.allowed_s:
                self.say(f"time is up before run {number}")
                return
            self.rng = random.Random(f"{self.experiment} {self.seed} {number}")
            yield number

    def row(self, **values: Any) -> dict[str, Any]:
        """Write down one observation, and say it."""
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
        self.rows.append(row)
        self.say("  ".join(f"{name} {value}" for name, value in row.items()))
        return row

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.bars.append(Bar(name, value, limit, at_least=True))

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.bars.append(Bar(name, value, limit, at_least=False))

    def all_identical(self) -> None:
        """The bar of every experiment with answers: the ids of each row that is about one are local transformers'."""
        share = mean(row["identical"] for row in self.rows if "identical" in row)
        self.at_least("share of runs with the ids of local transformers", share, 1)

    def prompt(self, tokens: int) -> list[int]:
        return [self.rng.randrange(*TOKEN_IDS) for _ in range(tokens)]

    def local(self, prompt: Sequence[int], count: int) -> list[int]:
        """What local transformers says, greedily in float32."""
        if self._local is None:
            self._local = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval()
        began_s = time.monotonic()
        ids = generate(self._local, prompt, count)
        self._local_rates.append(count / (time.monotonic() - began_s))
        return ids

    def saw(self, network: Network) -> None:
        """Keep what a network counted."""
        self.network = network.counts()

    def to_json(self) -> str:
        about = {
            "experiment": self.experiment,
            "seed": self.seed,
            "first": self.first,
            "runs": self.runs,
            "short": self.short,
            "resilience": self.resilience,
            "commit": self.commit,
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()},
            "model": MODEL,
            # a yardstick: a machine that is busy with other things is slow at this, too
            "local_tokens_per_s": median(self._local_rates) if self._local_rates else None,
            "seconds": round(time.monotonic() - self.started_s, 1),
        }
        bars = [asdict(bar) | {"met": bar.met} for bar in self.bars]
        return json.dumps(_finite(about | {"bars": bars, "rows": self.rows, "network": self.network}), allow_nan=False)

    def table(self) -> str:
        """The bars, for a README."""
        lines = [f"| {self.experiment}, seed {self.seed} | measured | bar | |", "|---|---|---|---|"]
        for bar in self.bars:
            limit = f"{'≥' if bar.at_least else '≤'} {bar.limit:.4g}"
            lines.append(f"| {bar.name} | {bar.value:.4g} | {limit} | {'met' if bar.met else 'NOT MET'} |")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Experiment:
    """`run` writes rows into the notebook, `runs` times over inside, or `runs_short` with `--short`; `report` makes
    bars of rows, also of those of several notebooks."""

    name: str
    title: str
    run: Callable[[Notebook], None]
    report: Callable[[Notebook], None] | None = None
    """None: bars are written by `run`."""
    _: KW_ONLY
    runs: int
    runs_short: int = 1


def ends(work: Callable[[], T], *, within_s: float = HANG_S) -> T:
    """The result of work that must not hang. Raises TimeoutError when it does, and what `work` raises."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(within_s)
    except FutureTimeout:
        raise TimeoutError(f"it hangs: no end within {within_s:.0f} s") from None
    finally:
        pool.shutdown(wait=False)


def mean(values: Any) -> float:
    return statistics.fmean(map(float, values))


def median(values: Any) -> float:
    return statistics.median(values)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: what never came is null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
