"""The loop: it learns, it resumes bit for bit, and what it leaves behind serves."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_models import new_model, random_batch, served_logits, short_preset
from typer.testing import CliRunner

from chiasm.alone import LOCK, alone
from chiasm.cli import app
from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.shapes import tensor_shapes
from chiasm.training import checkpoint, presets
from chiasm.training.data.packing import Batches, PackedBatch
from chiasm.training.data.stream import Stream
from chiasm.training.export import canonical, export
from chiasm.training.loop import Source, StepReport, Trainer
from chiasm.training.metrics import read_metrics
from chiasm.training.model import Part, part_of
from chiasm.training.presets import Preset, Stage
from chiasm.training.run import RUN, RunConfig, resume, start
from chiasm.types import Grid

SEGMENTS = [(9, [Grid(1, 4, 6)]), (20, []), (14, [Grid(4, 2, 4)])]
BFLOAT16_LOGITS = 0.1
"""Of the trained graph and the exported checkpoint: weights were rounded once more."""


def trainer(
    directory: Path,
    preset: Preset,
    source: Source | None = None,
    *,
    resume: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Trainer:
    model = new_model(directory / "description", preset, dtype=dtype)
    source = source or tasks(directory / "description")
    return Trainer(preset, model, source, directory, resume=resume)


def tasks(description: Path) -> Source:
    """The real stream, in this process."""

    def of(stage: Stage, first: int) -> Iterator[PackedBatch]:
        stream = Stream(stage.mix, seed=5)
        batches = Batches(
            stream=stream, checkpoint=description, max_tokens=stage.batch_tokens, start=first
        )
        return iter(batches)

    return of


def quiet(report: StepReport) -> None:
    """Nobody watches."""


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights, averages and moments."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    tensors = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert trainer.average is not None
    tensors |= {f"average {name}": value for name, value in trainer.average.weights.items()}
    for parameter, moments in trainer.optimizer.state.items():
        tensors |= {f"{key} {names[id(parameter)]}": value for key, value in moments.items()}
    return tensors


@pytest.mark.parametrize(
    ("ablation", "steps", "stage"), [(None, 3, 1), (None, 5, 2), ("no-isolation", 3, 1)]
)
def test_interrupted_and_not_give_the_same_bits(
    tmp_path: Path, ablation: str | None, steps: int, stage: int
) -> None:
    """Eight steps over four stages, in one go and stopped in the middle of one."""
    preset = short_preset(2, 2, 2, 2, ablation=ablation)
    preset = replace(preset, optimizer=replace(preset.optimizer, average_every=2))
    whole = trainer(tmp_path / "whole", preset)
    whole.run(quiet)
    first = trainer(tmp_path / "parts", preset)
    first.run(quiet, max_steps=steps)
    newest = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    torch.manual_seed(99)  # whatever else happened in between
    second = trainer(tmp_path / "parts", preset, resume=newest)
    assert (second.progress.step, second.progress.stage) == (steps, stage)
    second.run(quiet)
    assert second.progress == whole.progress
    expected, found = state(whole), state(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_run_stopped_before_its_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "find", lambda *_: short_preset(1, 1, 1, 1))
    config = RunConfig(seed=3)
    begun, again = start(tmp_path / "run", config), resume(tmp_path / "run")
    assert again.progress == checkpoint.Progress()
    expected, found = state(begun), state(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    with pytest.raises(InvalidArgument, match="resume"):
        resume(tmp_path / "nowhere")


def test_a_run_whose_recipe_has_changed_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = short_preset(1, 1, 1, 1)
    changed = replace(preset, objective=replace(preset.objective, z=0.5))
    monkeypatch.setattr(presets, "find", lambda *_: preset)
    start(tmp_path / "run", RunConfig())
    monkeypatch.setattr(presets, "find", lambda *_: changed)
    with pytest.raises(InvalidArgument, match="another recipe") as caught:
        resume(tmp_path / "run")
    assert caught.value.field == "resume"
    # A run from before recipes were kept says nothing of its own, and goes on.
    begun = json.loads((tmp_path / "run" / RUN).read_text())
    assert begun.pop("recipe") == preset.digest
    (tmp_path / "run" / RUN).write_text(json.dumps(begun))
    assert resume(tmp_path / "run").preset == changed


def test_what_was_written_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    """A run that is killed between checkpoints tells every step once."""
    preset = replace(short_preset(7), log_every=1, checkpoint_every=2)

    def killed(report: StepReport) -> None:
        if report.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, preset).run(killed)
    assert [int(row["step"]) for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    before = read_metrics(tmp_path)[:4]
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name == "step-00000004"
    trainer(tmp_path, preset, resume=newest).run(quiet)
    rows = read_metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[:4] == before


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_gradients_are_clipped_before_the_step(
    tmp_path: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the norm that is allowed; metrics tell what it was before."""
    preset = replace(short_preset(2), log_every=1)
    preset = replace(preset, optimizer=replace(preset.optimizer, clip_norm=limit))
    run = trainer(tmp_path, preset)
    norms: list[float] = []
    step = run.optimizer.step

    def observed() -> None:
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        step()

    monkeypatch.setattr(run.optimizer, "step", observed)
    run.run(quiet)
    told = [float(row["grad_norm"]) for row in read_metrics(tmp_path)]
    assert all(0.01 < norm < 1e6 for norm in told)
    assert norms == pytest.approx([min(norm, limit) for norm in told], rel=1e-3)


def test_the_first_stages_leave_vision_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, short_preset(2, 1, 1, 1))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run(quiet, max_steps=3)
    for name, parameter in run.model.named_parameters():
        if part_of(name) is not Part.TEXT:
            assert torch.equal(parameter.detach(), before[name]), name
    run.run(quiet)
    moved = {
        part_of(name)
        for name, parameter in run.model.named_parameters()
        if not torch.equal(parameter.detach(), before[name])
    }
    assert moved == set(Part)


def test_sight_alone_moves_what_sees_and_learns_to_read(tmp_path: Path) -> None:
    preset = short_preset(1, 1, 60, 1)
    preset = replace(preset, stages=(preset.stage("sight"),))
    source = tasks(tmp_path / "description")
    losses: list[float] = []
    run = trainer(tmp_path, preset, lambda stage, first: itertools.cycle([next(source(stage, 0))]))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run(lambda report: losses.append(report.loss))
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]
    moved = {
        part_of(name)
        for name, parameter in run.model.named_parameters()
        if not torch.equal(parameter.detach(), before[name])
    }
    assert moved == {Part.VIT, Part.ADAPTER, Part.PROBES}


def test_detached_text_stands_still_in_batches_with_media(tmp_path: Path) -> None:
    preset = short_preset(1, 1, 1, 2)
    stage = replace(preset.stage("joint"), mix={"shape": 1}, detach_text=True)
    objective = replace(preset.objective, orthogonality=0.0, bias_step=0.0)
    preset = replace(preset, stages=(stage,), objective=objective)
    run = trainer(tmp_path, preset)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run(quiet)
    for name, parameter in run.model.named_parameters():
        if part_of(name) is Part.TEXT:
            assert torch.equal(parameter.detach(), before[name]), name


def test_smoke_learns_a_batch_and_serves_what_it_learnt(tmp_path: Path) -> None:
    preset = short_preset(1, 1, 1, 30)
    preset = replace(preset, stages=(preset.stage("joint"),))
    losses: list[float] = []
    run = trainer(tmp_path, preset)
    batch = random_batch(run.model.config, SEGMENTS)
    run = trainer(tmp_path, preset, lambda stage, first: iter(lambda: batch, None))
    run.run(lambda report: losses.append(report.loss))
    assert len(losses) == 30
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]
    rows = read_metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]
    assert float(rows[-1]["loss"]) == pytest.approx(losses[-1], rel=1e-4)
    with (tmp_path / "load.csv").open() as lines:
        shares = [float(row["share"]) for row in csv.DictReader(lines)]
    num_gates, text = 2 * len(run.model.moe_blocks()), run.model.config.text
    assert len(shares) == num_gates * text.num_experts
    assert sum(shares) == pytest.approx(num_gates, rel=1e-4)

    own = {name: p.detach() for name, p in run.model.named_parameters()}
    export(run.model, own, tmp_path / "description", tmp_path / "model", shard_bytes=1 << 20)
    config = ModelConfig.load(tmp_path / "model")
    with Checkpoint(tmp_path / "model", config) as stored:
        assert all(stored.has(name) for name in tensor_shapes(config))
    with torch.no_grad():
        logits = run.model.logits(batch)
    served = served_logits(tmp_path / "model", batch)
    assert (served - logits).abs().mean() < BFLOAT16_LOGITS


def test_only_complete_and_new_checkpoints_are_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(short_preset(2, 1, 1, 1), checkpoint_every=1))
    with pytest.raises(NotFound):
        checkpoint.newest(tmp_path / "checkpoints")
    run.run(quiet)
    (tmp_path / "checkpoints" / "step-00000099.partial").mkdir()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*") if not p.suffix)
    assert kept == ["step-00000004", "step-00000005"]
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000005"


def test_the_command_refuses_what_does_not_exist(tmp_path: Path) -> None:
    for arguments in (["--preset", "huge"], ["--ablation", "no-data"], ["--stage", "last"]):
        result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 2
        assert arguments[0].removeprefix("--") in result.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [["--preset", "bundled"], ["--seed", "0"], ["--out", "run"], ["--stage", "joint"]]
)
def test_a_run_that_goes_on_takes_no_new_settings(flags: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path), *flags])
    assert result.exit_code == 2
    assert f"no {flags[0]}" in result.stderr


def test_a_run_that_ends_before_its_first_line_leaves_a_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--preset", "smoke", "--max-steps", "1", "--out", str(out)]
    done = CliRunner().invoke(app, ["train", *flags])
    assert done.exit_code == 0, done.output
    assert (out / "model" / "config.json").exists()
    assert (out / "loss.png").exists()
    assert not (out / LOCK).exists()
    before = (out / "metrics.csv").read_bytes()
    with alone(out, "writing to"):
        second = CliRunner().invoke(app, ["train", "--resume", str(out)])
    assert second.exit_code != 0
    assert "another process is writing" in second.output
    assert (out / "metrics.csv").read_bytes() == before


def test_a_run_begins_with_the_weights_and_words_of_a_model(tmp_path: Path) -> None:
    flags = ["train", "--preset", "smoke", "--max-steps", "1"]
    assert CliRunner().invoke(app, [*flags, "--out", str(tmp_path / "one")]).exit_code == 0
    model = tmp_path / "one" / "model"
    config = RunConfig(preset="smoke", stage="words", model=str(model), seed=7)
    begun = start(tmp_path / "two", config)
    words = (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "two" / "description" / "tokenizer.json").read_bytes() == words
    again = resume(tmp_path / "two")  # which has no checkpoint yet
    with Checkpoint(model, ModelConfig.load(model)) as stored:
        for trainer in (begun, again):
            found = canonical(trainer.weights, begun.model.config.text)
            assert found.keys() == tensor_shapes(ModelConfig.load(model)).keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, stored.get(name).float()), name


@pytest.mark.parametrize("model", ["absent", "wider"])
def test_a_model_that_a_run_cannot_begin_with_is_refused(model: str, tmp_path: Path) -> None:
    if model == "wider":
        preset = short_preset(1)
        wider = replace(preset, dimensions=replace(preset.dimensions, intermediate_size=72))
        new = new_model(tmp_path / "description", wider)
        weights = {name: p.detach() for name, p in new.named_parameters()}
        export(new, weights, tmp_path / "description", tmp_path / model, shard_bytes=1 << 20)
    flags = ["train", "--preset", "smoke", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*flags, "--model", str(tmp_path / model)])
    assert done.exit_code == 2, done.output
    assert ("[72, 32]" if model == "wider" else "tokenizer.json") in done.stderr
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("command", [["train", "--preset", "smoke", "--out"], ["synth"]])
def test_a_folder_that_cannot_be_written_is_told_in_a_line(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "/proc/no/such/folder"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
