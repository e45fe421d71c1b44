"""What the parts of the training recipe are worth: each left out in turn, several seeds.

    python -m benchmarks.ablations --out DIR [--seeds 3] [--jobs 2]
    python -m benchmarks.ablations                                    the table of what was measured

Every run has the preset `ablation`: the bundled model's dimensions and losses, sight and then the
tasks that are learnt first, no stage of text; the same steps on the same samples. Accuracy is exact
match on held-out samples; the loads are those of held-out samples, too. Runs that are done are kept
in --out, and those that were stopped go on; their seconds are then those since.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import documents
from chiasm.training import presets
from chiasm.training.data.encode import Encoder
from chiasm.training.losses import orthogonality
from chiasm.training.model import TrainingModel
from chiasm.training.routing import Usage, add_usage
from chiasm.training.run import RUN, RunConfig, resume, start
from chiasm.training.score import exact_match, load_entropy
from chiasm.types import Modality

WHOLE = "whole recipe"
SAMPLES = 100
NAME = "ablations"
_RESULT = "result.json"
_MEASURES = {
    "accuracy": ("{}, % right", 100, 1),
    "orthogonality": ("orthogonality, {} gates", 1, 5),
    "entropy": ("entropy of load, {} tokens", 1, 4),
}
"""Title of what was measured, its unit in the table, and digits after the point."""


def main() -> None:
    """Trains what is missing, prints the table, writes results/ablations.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    options = parser.parse_args()
    if options.out is None:
        sys.stdout.write(table(measured()["summary"]))
        return
    variants = (None, *presets.ABLATIONS)
    runs = [(v, seed) for seed in range(options.seeds) for v in variants]
    with documents.measuring(NAME) as document:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            found = list(pool.map(_run, [options.out] * len(runs), *zip(*runs, strict=True)))
        rows = summary(found)
        document["result"] = {"runs": found, "summary": rows}
    sys.stdout.write(table(rows))


def measured() -> dict[str, Any]:
    """The runs that results/ablations.json keeps, and their summary."""
    found: dict[str, Any] = json.loads((documents.FOLDER / f"{NAME}.json").read_text())["result"]
    return found


def _run(out: Path, variant: str | None, seed: int) -> dict[str, Any]:
    """Trains and scores one model, or reads what it scored before."""
    directory = out / f"{variant or 'whole'}-{seed}"
    file = directory / _RESULT
    if (directory / RUN).exists():
        trainer = resume(directory)  # which refuses a run that began with another recipe
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
    else:
        trainer = start(directory, RunConfig(preset="ablation", ablation=variant, seed=seed))
    began = time.monotonic()
    trainer.run(lambda _: None)
    seconds = time.monotonic() - began
    torch.set_num_threads(1)
    found = {"variant": variant or WHOLE, "seed": seed, "seconds": seconds}
    found |= _score(trainer.model.eval(), directory)
    file.write_text(json.dumps(found))
    return found


def _score(model: TrainingModel, directory: Path) -> dict[str, Any]:
    encoder = Encoder.load(directory / "description")
    accuracy: dict[str, float] = {}
    usage: Usage = {}
    for task in presets.find("ablation").stages[-1].mix:
        accuracy[task], chosen = exact_match(model, encoder, task, SAMPLES)
        add_usage(usage, chosen)
    gates = (Modality.TEXT,) if model.shared_pool else tuple(Modality)
    return {
        "accuracy": accuracy,
        "orthogonality": {
            gate: statistics.mean(
                float(orthogonality(model.gate(layer, gate).detach()))
                for layer in model.moe_blocks()
            )
            for gate in gates
        },
        "entropy": {
            modality: statistics.mean(
                load_entropy(counts) for (m, _), counts in usage.items() if m is modality
            )
            for modality in Modality
        },
    }


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over seeds of every number, of each variant; accuracy also over the tasks."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in found):
        own = [run for run in found if run["variant"] == variant]
        means = {"mean": _spread([statistics.mean(run["accuracy"].values()) for run in own])}
        spreads = {
            name: {key: _spread([run[name][key] for run in own]) for key in own[0][name]}
            for name in _MEASURES
        }
        rows.append({"variant": variant, **spreads, "accuracy": means | spreads["accuracy"]})
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A summary in Markdown, a variant a column: means, and the lowest and highest of the seeds."""
    columns = [
        {
            title.format(key): _with_range(spread, unit, digits)
            for measure, (title, unit, digits) in _MEASURES.items()
            for key, spread in row[measure].items()
        }
        for row in rows
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [
        ["", *(row["variant"] for row in rows)],
        ["---"] * (1 + len(rows)),
        *([name, *(column.get(name, "") for column in columns)] for name in names),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _with_range(spread: Mapping[str, float], unit: int, digits: int) -> str:
    mean, low, high = (f"{unit * spread[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
