"""The picture of a scenario: its load, and the replicas of each pool under each scaler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.elasticity.compare import TTFT_S, Run
from benchmarks.elasticity.traces import Scenario
from chiasm.orchestrator.types import Pool


def draw(scenario: Scenario, runs: Mapping[str, Run], path: Path) -> None:
    """Writes the figure; its format is that of the path's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 12), layout="constrained")
    axes = figure.subplots(len(Pool) + 2, 1, sharex=True)
    times = np.linspace(0, scenario.seconds, 1000)
    axes[0].plot(times, [scenario.text(t) for t in times], label="text")
    axes[0].plot(times, [scenario.images(t) for t in times], label="images")
    axes[0].set(title=scenario.name, ylabel="load, replicas")
    axes[0].legend(loc="upper right", fontsize="small")
    for axis, pool in zip(axes[1:], Pool, strict=False):
        for name, run in runs.items():
            axis.step(run.times, run.replicas[pool], where="post", label=name, linewidth=1)
        axis.set(ylabel=pool, ylim=(-0.3, None))
    for name, run in runs.items():
        late = sorted(
            job.request.at
            for job in run.jobs
            if job.first_token_at is None
            or job.first_token_at - job.request.at
            > TTFT_S["image" if job.request.images else "text"]
        )
        axes[-1].step(late, range(1, len(late) + 1), where="post", label=name)
    axes[-1].set(ylabel="late first tokens", xlabel="s", xlim=(0, scenario.seconds))
    axes[1].legend(loc="upper right", fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
