"""What ablations make of their runs, and that the guide tells it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are not part of the package

from benchmarks import ablations
from chiasm.errors import InvalidArgument
from chiasm.training import presets

GUIDE = Path(__file__).parents[2] / "docs/training.md"


def run(variant: str, digits: float, sums: float, **gates: float) -> dict[str, Any]:
    accuracy = {"digits": digits, "sums": sums}
    return {"variant": variant, "accuracy": accuracy, "orthogonality": gates, "entropy": gates}


RUNS = [
    run("whole recipe", 0.5, 0.1, text=0.25, vision=0.5),
    run("no-isolation", 0.25, 0.0, text=0.125),
    run("whole recipe", 1.0, 0.2, text=0.75, vision=0.5),
]


def test_a_summary_has_every_variant_once_with_the_range_of_its_seeds() -> None:
    whole, pool = ablations.summary(RUNS)
    assert (whole["variant"], pool["variant"]) == ("whole recipe", "no-isolation")
    assert list(whole["accuracy"]) == ["mean", "digits", "sums"]
    mean = whole["accuracy"]["mean"]  # over tasks of each run, then over runs
    assert mean == pytest.approx({"mean": 0.45, "min": 0.3, "max": 0.6})
    assert whole["accuracy"]["digits"] == {"mean": 0.75, "min": 0.5, "max": 1.0}
    assert whole["orthogonality"]["text"] == {"mean": 0.5, "min": 0.25, "max": 0.75}
    assert pool["entropy"] == {"text": {"mean": 0.125, "min": 0.125, "max": 0.125}}


def test_a_table_has_a_row_for_everything_that_was_measured() -> None:
    rows = [line.strip("| ").split(" | ") for line in _table(RUNS).splitlines()]
    assert rows[0] == ["whole recipe", "no-isolation"]
    assert [row[0] for row in rows[2:]] == [
        "mean, % right",
        "digits, % right",
        "sums, % right",
        "orthogonality, text gates",
        "orthogonality, vision gates",
        "entropy of load, text tokens",
        "entropy of load, vision tokens",
    ]
    assert rows[3] == ["digits, % right", "75.0 (50.0 to 100.0)", "25.0 (25.0 to 25.0)"]
    assert rows[5][1:] == ["0.50000 (0.25000 to 0.75000)", "0.12500 (0.12500 to 0.12500)"]
    assert rows[6] == ["orthogonality, vision gates", "0.50000 (0.50000 to 0.50000)"]  # no gate
    assert rows[7][1] == "0.5000 (0.2500 to 0.7500)"


def test_a_result_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    directory = tmp_path / "whole-0"
    directory.mkdir()
    (directory / "result.json").write_text("{}")
    (directory / "run.json").write_text('{"preset": "ablation", "recipe": "of last year"}')
    with pytest.raises(InvalidArgument, match="another recipe"):
        ablations._run(tmp_path, None, 0)


def _table(runs: list[dict[str, Any]]) -> str:
    return ablations.table(ablations.summary(runs))


def test_the_guide_tells_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ablations.measured()
    assert ablations.summary(kept["runs"]) == kept["summary"]
    monkeypatch.setattr(sys, "argv", ["ablations"])
    ablations.main()
    printed = capsys.readouterr().out
    assert printed == _table(kept["runs"])
    assert printed in GUIDE.read_text(encoding="utf-8")


def test_every_ablation_was_measured_with_as_many_seeds() -> None:
    runs = ablations.measured()["runs"]
    variants = (ablations.WHOLE, *presets.ABLATIONS)
    seeds = {run["seed"] for run in runs}
    assert sorted((r["variant"], r["seed"]) for r in runs) == sorted(
        (variant, seed) for variant in variants for seed in seeds
    )
    tasks = set(presets.find("ablation").stage("joint").mix)
    assert all(run["accuracy"].keys() == tasks for run in runs)
