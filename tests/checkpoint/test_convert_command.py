"""`chiasm convert` as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import untrained
from checkpoint.test_convert import convert
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from chiasm.cli import app
from chiasm.convert import calibrate, memory, report
from chiasm.convert.plan import Options
from chiasm.training.data.tasks import TASKS

TEXT_FILE = "experts-001-text.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.write(tmp_path_factory.mktemp("untrained"))


def run(model: Path, out: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["convert", "--model", str(model), "--out", str(out), *flags])


def test_the_report_is_written_before_it_is_printed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", list[dict[str, object]]()
    file = out / "chiasm_conversion.json"
    monkeypatch.setattr(report, "table", lambda _: seen.append(json.loads(file.read_text())) or "")
    done = run(tiny_checkpoint, out, "--text-experts", "int8")
    assert done.exit_code == 0, done.output
    (document,) = seen
    assert document["layers"]


def test_eval_asks_both_models(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path, "--text-experts", "int4", "--eval", "1")
    assert done.exit_code == 0, done.output
    quality = json.loads((tmp_path / "chiasm_conversion.json").read_text())["quality"]
    assert quality.keys() == {*TASKS, "all"}
    assert quality["all"]["num_questions"] == len(TASKS)
    assert quality["all"]["mean_divergence_nats"] > 0
    assert all(task in done.stdout for task in quality)


def test_calibrate_weighs_errors_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--text-experts", "int4", "--calibrate", "6")
    done = run(model, tmp_path / "out", *flags)
    assert done.exit_code == 0, done.output
    assert '"calibrating"' in done.stderr
    convert(model, tmp_path / "plain", Options(text_experts="int4"))
    weighed, plain = (load_file(tmp_path / out / TEXT_FILE) for out in ("out", "plain"))
    assert any(not torch.equal(weighed[name], plain[name]) for name in plain)

    def fail(*_: Any) -> None:
        raise AssertionError("nothing is left to be weighed")

    monkeypatch.setattr(calibrate, "collect", fail)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    again = run(model, tmp_path / "out", *flags)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("option", ["--calibrate", "--eval"])
def test_whole_models_that_do_not_fit_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000)
    refused = run(model, tmp_path, "--text-experts", "int4", option, "1")
    assert refused.exit_code == 2
    assert f"error: {option}: whole models are held in memory" in refused.stderr
    assert "0.0 GB are available" in refused.stderr
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("sideways", "'sideways' is none"),
        ("meta", "by cpu or cuda, not meta"),
        ("cuda:99", "cuda:99 is not there"),
        ("cuda:1000", "cuda:1000 is not there"),  # torch makes -24 of it
    ],
)
def test_devices_that_cannot_be_used_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, device: str, message: str
) -> None:
    refused = run(tiny_checkpoint, tmp_path / "out", "--text-experts", "int8", "--device", device)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --device: ")
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()
