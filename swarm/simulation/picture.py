"""A report's curves as a picture. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from swarm.simulation.report import Report


def draw(report: Report, file: Path) -> None:
    """The curves of `Report.page`. Raises OSError."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    rates, peers = figure.subplots(2, sharex=True)
    for axes, name, curves in zip((rates, peers), ("tokens/s", "peers"), report.curves, strict=True):
        for label, values in curves.items():
            axes.plot([sample.at_s / 60 for sample in report.samples], values, label=label, linewidth=1)
        axes.set(ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    peers.set(xlabel="minutes")
    figure.suptitle(report.lines()[0], fontsize=9)
    figure.savefig(file, dpi=120, format="png")
