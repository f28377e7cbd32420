"""The experiments that `scripts/lab` knows, by name. Each has its bars from what the project promises."""

from __future__ import annotations

from typing import Final

from tests.lab.experiments import churn, drawn, faults, grey, kills, leaving, links, users
from tests.lab.notebook import Experiment

EXPERIMENTS: Final[dict[str, Experiment]] = {
    experiment.name: experiment
    for module in (kills, drawn, grey, faults, churn, leaving, links, users)
    for experiment in module.EXPERIMENTS
}
