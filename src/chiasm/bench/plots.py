"""The figure of an experiment: latencies as CDFs, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chiasm import errors
from chiasm.bench.experiment import Run

MAX_RUNS = 12
"""Runs that a figure shows; more could not be told apart."""


def require() -> None:
    """Raises FailedPrecondition where matplotlib is missing; ask before a run, not after it."""
    try:
        import matplotlib as _  # noqa: F401
    except ModuleNotFoundError as error:
        raise errors.FailedPrecondition(
            f"--plot needs {error.name}: pip install 'chiasm[bench]'"
        ) from None


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the figure in the format of the path's ending. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([["ttft", "itl", "e2e"], ["tokens", "tokens", "flight"]])
    for run in runs[:MAX_RUNS]:
        slot = run.slot
        label = f"{slot.endpoint} {slot.point} #{slot.repeat + 1}".strip()
        for metric, values in run.curves.cdf_ms.items():
            axes[metric].plot(values, np.linspace(0, 1, values.size), label=label)
        axes["tokens"].plot(run.curves.bin_s, run.curves.tokens_per_s, label=label)
        axes["flight"].plot(run.curves.bin_s, run.curves.in_flight, label=label)
    for metric in ("ttft", "itl", "e2e"):
        axes[metric].set(title=metric.upper(), xlabel="ms", ylabel="share of samples", ylim=(0, 1))
    axes["tokens"].set(title="output tokens/s", xlabel="s", ylim=(0, None))
    axes["flight"].set(title="requests in flight", xlabel="s", ylim=(0, None))
    for axis in axes.values():
        axis.grid(alpha=0.3)
    axes["tokens"].legend(fontsize="small")
    figure.savefig(path)
