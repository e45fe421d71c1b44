"""A run's state on disk: whole under its name, and refused where it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_models import new_model, short_preset

from chiasm.errors import DataLoss, InvalidArgument
from chiasm.training.checkpoint import Progress, load, save
from chiasm.training.model import TrainingModel
from chiasm.training.optimizer import WeightAverage, build, named_learners
from chiasm.training.presets import Preset

PRESET = short_preset(1)
State = tuple[TrainingModel, torch.optim.Optimizer, WeightAverage]


def state(directory: Path, preset: Preset = PRESET) -> State:
    """As it is before the first step."""
    model = new_model(directory / "description", preset)
    return model, build(model, preset.optimizer), WeightAverage(model, 0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> State:
    """As it is behind one."""
    model, optimizer, average = state(tmp_path_factory.mktemp("trained"))
    for parameter in named_learners(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer, average


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    named = os.replace

    def renamed(source: Path, target: Path) -> None:
        done.append("named")
        named(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", renamed)
    saved = save(tmp_path / "checkpoints", Progress(step=3), *state(tmp_path))
    files = {path.stat().st_ino for path in saved.iterdir()}
    assert len(files) == 4
    assert {*done[:4]} == files
    assert done[4:] == [saved.stat().st_ino, "named", saved.parent.stat().st_ino]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoints", Progress(), *state(tmp_path / "one"))
    wider = replace(PRESET, dimensions=replace(PRESET.dimensions, intermediate_size=72))
    with pytest.raises(InvalidArgument, match="another model"):
        load(saved, *state(tmp_path / "other", wider))


def without(*names: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        for name in names:
            del tensors[name]
        file.unlink()  # tensors are views of it
        save_file(tensors, file)

    return damage


def cut(file: Path) -> None:
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])


EMBEDDING = "language.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("optimizer.safetensors", without("rng"), "rng"),
        ("optimizer.safetensors", without(f"{EMBEDDING}.step"), f"{EMBEDDING}.step"),
        ("optimizer.safetensors", without(f"{EMBEDDING}.exp_avg_sq"), f"{EMBEDDING}.exp_avg_sq"),
        ("optimizer.safetensors", cut, "optimizer.safetensors"),
        ("model.safetensors", cut, "model.safetensors"),
        ("average.safetensors", Path.unlink, "average.safetensors"),
        ("state.json", cut, "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_told_by_its_file(
    tmp_path: Path, trained: State, name: str, damage: Callable[[Path], None], told: str
) -> None:
    saved = save(tmp_path, Progress(step=1), *trained)
    assert load(saved, *trained) == Progress(step=1)
    damage(saved / name)
    with pytest.raises(DataLoss, match=told) as caught:
        load(saved, *trained)
    assert caught.value.reason == "CHECKPOINT_CORRUPT"
    assert str(saved / name) in str(caught.value)


def test_what_was_never_trained_has_no_moments(tmp_path: Path) -> None:
    model, optimizer, average = state(tmp_path)
    saved = save(tmp_path / "checkpoints", Progress(), model, optimizer, average)
    load(saved, model, optimizer, average)
    assert not optimizer.state
