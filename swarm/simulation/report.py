"""What a simulation found: numbers for programs, lines for people, a page with curves."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any, Final

from swarm.simulation.world import USERS_PER_PEER, SimulationConfig

OF_BOUND_MIN: Final = 0.85
SLOWEST_TO_MEAN_MIN: Final = 0.6
COVERAGE_MIN: Final = 0.999
MOVES_PER_JOIN_MAX: Final = 0.2
"""Wanted of an hour of 1,000 peers with a churn of 0.2 per hour."""
HOUR_MIN: Final = 60.0
"""Within less some users get far less than the mean: who has lost several hops then has computed little else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One moment, in seconds since counting began."""

    at_s: float
    tokens_per_s: float
    """Whose steps were answered in this second."""
    bound_tokens_per_s: float
    users_bound_tokens_per_s: float
    covered: bool
    peers: int
    """Online."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was counted after the warm-up."""

    config: SimulationConfig
    samples: tuple[Sample, ...]
    tokens_per_s: float
    """Of prompts and new ones, each once, when its step was answered."""
    written_tokens_per_s: float
    """New ones alone."""
    again_tokens_per_s: float
    """That were computed again because of lost hops, of all blocks or for their part."""
    bound_tokens_per_s: float
    """The mean of the maximum flow."""
    users_bound_tokens_per_s: float
    """What so many users could ask for if each had the swarm to himself: no more than one token each per trip through
    all blocks, so a swarm with few users for its size cannot come near its maximum flow."""
    coverage: float
    """The share of seconds in which every block had an online peer."""
    first_token_s: float
    """Median."""
    fairness: float
    """Jain's index over users, of tokens through all blocks."""
    slowest_to_mean: float
    joins: int
    moves: int
    heals: int
    """Moves because of a gap."""
    healed_s_max: float
    """The longest gap."""
    downloaded_bytes: int
    """Of weights."""
    hidden_bytes: int
    """Of hidden states in steps that were answered, over all ways."""
    replayed_bytes: int
    """The same of those that were sent again, most of them by hops."""
    rebuilt_routes: int
    """By sessions that went on: because of a hop that died, left, moved, or was slow."""
    busy_answers: int
    """Opens that a peer without room declined."""
    failures: dict[str, int]
    """Sessions that ended without their answer, by reason."""
    hops: float
    """Mean, per route."""

    @property
    def of_bound(self) -> float:
        return self.tokens_per_s / self.bound_tokens_per_s if self.bound_tokens_per_s else 0.0

    @property
    def of_least_bound(self) -> float:
        """Of the smaller of both bounds."""
        least = min(self.bound_tokens_per_s, self.users_bound_tokens_per_s)
        return self.tokens_per_s / least if least else 0.0

    @property
    def moves_per_join(self) -> float:
        return self.moves / max(1, self.joins)

    @property
    def met(self) -> dict[str, bool | None]:
        """Of each bar, by the name of what it is about; None where it is missed by a run that says little about it."""
        crowded, long = self.config.users >= USERS_PER_PEER * self.config.peers, self.config.minutes >= HOUR_MIN
        return {
            "of_bound": self.of_bound >= OF_BOUND_MIN or (False if crowded else None),
            "slowest_to_mean": self.slowest_to_mean >= SLOWEST_TO_MEAN_MIN or (False if long else None),
            "coverage": self.coverage >= COVERAGE_MIN,
            "moves_per_join": self.moves_per_join <= MOVES_PER_JOIN_MAX,
        }

    def as_plain(self) -> dict[str, Any]:
        """As JSON values."""
        plain = asdict(self)
        plain["samples"] = [asdict(sample) for sample in self.samples]
        return plain | {
            "of_bound": self.of_bound,
            "of_least_bound": self.of_least_bound,
            "moves_per_join": self.moves_per_join,
            "met": self.met,
        }

    def lines(self) -> list[str]:
        """For people."""
        c, verdicts = self.config, {True: "met", False: "missed", None: "not judged"}
        met = {name: verdicts[met] for name, met in self.met.items()}
        return [
            f"{c.peers:,} peers, {c.users:,} users through {c.clients:,} clients, {c.minutes:g} minutes, "
            f"{c.churn_per_hour:.0%} churn per hour, seed {c.seed}",
            f"throughput   {self.tokens_per_s:,.0f} tokens/s, {self.of_bound:.1%} of the maximum flow "
            f"({self.bound_tokens_per_s:,.0f}); {self.written_tokens_per_s:,.0f} of them new",
            f"             and {self.again_tokens_per_s:,.0f} tokens/s computed again because of lost hops",
            f"             bar: at least {OF_BOUND_MIN:.0%} of the maximum flow with {USERS_PER_PEER} users per peer: "
            f"{met['of_bound']}",
            f"             {self.users_bound_tokens_per_s:,.0f} if every user had the swarm to himself: "
            f"{self.of_least_bound:.1%} of the smaller bound",
            f"first token  {self.first_token_s:.2f} s (median), over {self.hops:.1f} hops",
            f"fairness     {self.fairness:.3f} (Jain); the slowest user has {self.slowest_to_mean:.0%} of the mean",
            f"             bar: at least {SLOWEST_TO_MEAN_MIN:.0%} of the mean over an hour: {met['slowest_to_mean']}",
            f"coverage     {self.coverage:.3%} of the time; longest gap {self.healed_s_max:.0f} s",
            f"             bar: at least {COVERAGE_MIN:.1%} of the time: {met['coverage']}",
            f"placement    {self.joins} joins, {self.moves} moves, {self.heals} of them to close a gap: "
            f"{self.moves_per_join:.2f} per join; {self.downloaded_bytes / 1e9:,.0f} GB downloaded",
            f"             bar: at most {MOVES_PER_JOIN_MAX:g} moves per join: {met['moves_per_join']}",
            f"links        {self.hidden_bytes / 1e9:,.1f} GB of hidden states, and {self.replayed_bytes / 1e9:,.1f} GB "
            "of them sent again",
            f"sessions     {self.rebuilt_routes} went on over other hops, {sum(self.failures.values())} failed; "
            f"{self.busy_answers} opens found no room",
            *(f"             {count} of them: {reason}" for reason, count in self.failures.items()),
        ]

    @property
    def curves(self) -> tuple[dict[str, list[float]], ...]:
        """By chart and name, a value for each sample."""
        rates = {
            "tokens/s": [sample.tokens_per_s for sample in self.samples],
            "maximum flow": [sample.bound_tokens_per_s for sample in self.samples],
        }
        return rates, {"peers online": [float(sample.peers) for sample in self.samples]}

    def page(self) -> str:
        """A self-contained HTML page."""
        text = "\n".join(map(html.escape, self.lines()))
        return (
            "<!doctype html><meta charset=utf-8><title>swarm simulate</title>"
            "<style>body{font:14px sans-serif;margin:2em}svg{border:1px solid #ccc}</style>"
            f"<pre>{text}</pre>{''.join(map(_chart, self.curves))}\n"
        )


def _chart(curves: dict[str, list[float]], width: int = 800, height: int = 240) -> str:
    top = max((value for values in curves.values() for value in values), default=1.0) or 1.0
    parts, colours = [], ("#1668a8", "#c2410c", "#15803d")
    for index, (name, values) in enumerate(curves.items()):
        step = width / max(1, len(values) - 1)
        points = " ".join(f"{at * step:.1f},{height * (1 - value / top / 1.1):.1f}" for at, value in enumerate(values))
        colour = colours[index % len(colours)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        parts.append(f'<text x="8" y="{18 + 16 * index}" fill="{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{width - 90}" y="18">top {top * 1.1:,.0f}</text>')
    return f'<p><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg></p>'
