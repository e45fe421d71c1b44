"""Serving under load: a small closed-loop sweep, pools apart against pools inside the decoder.

Both systems run at the same time and are measured in turns by `chiasm bench serve`'s experiment,
so that a machine that drifts hits both alike; the ratio of each pair of runs is what counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from chiasm.bench import report as bench_report
from chiasm.bench.experiment import Experiment, connector
from chiasm.bench.options import BenchOptions
from chiasm.local import LocalStack, StackConfig

SETTINGS = {
    "input_len": "uniform:32,96",
    "output_len": "24",
    "image_share": 0.25,
    "image_size": "112x112,224x112",
    "sweep": "concurrency=1,8",
    "num_requests": 24,
    "repeat": 3,
    "slo": "ttft=2000,itl=200",
}


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Measures both arrangements of `model`; returns the document of the experiment."""
    with contextlib.ExitStack() as running:
        arrangements = {"colocated": True, "disaggregated": False}
        options = BenchOptions.model_validate(
            {
                "compare": [
                    f"{name}={_start(running, StackConfig(model=model, colocate=colocate))}"
                    for name, colocate in arrangements.items()
                ],
                **SETTINGS,
            }
        )
        experiment = Experiment(
            options, connector(options), on_run=lambda slot: report(f"{slot.endpoint} {slot.point}")
        )
        outcome = asyncio.run(experiment.run())
    console = Console(width=bench_report.WIDTH)
    with console.capture() as captured:
        console.print(bench_report.tables(outcome))
    report(captured.get())
    if outcome.error:
        raise RuntimeError(outcome.error)
    return bench_report.document(options, outcome)


def _start(running: contextlib.ExitStack, config: StackConfig) -> str:
    """The address of a stack that runs as long as `running`."""
    stack = LocalStack(config)
    running.callback(stack.stop)
    return stack.start()
