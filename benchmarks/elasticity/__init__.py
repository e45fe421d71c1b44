"""Elasticity: the scaling policy against an HPA on CPU, KEDA on queues, and an oracle, simulated.

The policy is the orchestrator's own code. Service times come from rates.json, which `python -m
benchmarks.elasticity.measure` writes from a small stack on this machine; the load is given in
replicas, so that what is compared does not hang on them. Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import documents
from benchmarks.elasticity import plots
from benchmarks.elasticity.compare import SECONDS, compare
from benchmarks.elasticity.rates import read
from benchmarks.elasticity.traces import scenarios

RATES = Path(__file__).parent / "rates.json"
SEED = 0


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """All scenarios under all scalers; returns the figures and draws a picture of each scenario."""
    rates, found = read(RATES), {}
    for scenario in scenarios(SECONDS, SEED):
        runs = compare(scenario, rates, SEED)
        plots.draw(
            scenario, runs, documents.FOLDER / f"elasticity-{scenario.name.replace(' ', '-')}.png"
        )
        found[scenario.name] = {name: run.summary() for name, run in runs.items()}
        for name, run in runs.items():
            numbers = ", ".join(f"{what} {value:g}" for what, value in run.summary().items())
            report(f"{scenario.name}: {name}: {numbers}")
    return {"seed": SEED, "seconds": SECONDS, "scenarios": found}
