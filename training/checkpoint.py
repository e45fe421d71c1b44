"""A run's state on disk: enough to go on as if it had never stopped.

Tensors are safetensors, the rest is JSON; nothing is pickled. A checkpoint is a folder that appears
under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chiasm.durable import sync
from chiasm.errors import DataLoss, InvalidArgument, NotFound
from chiasm.training.model import TrainingModel
from chiasm.training.optimizer import WeightAverage, named_learners

_KEPT = 2
_MODEL, _OPTIMIZER, _AVERAGE, _STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "state.json",
)
_RNG = "rng"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_PREFIX, _PARTIAL = "step-", ".partial"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run is."""

    stage: int = 0
    """Index of the stage."""
    stage_step: int = 0
    """Steps done in it."""
    next_sample: int = 0
    """Index in the stage's stream of the first sample not yet trained on."""
    step: int = 0
    """Steps done in all stages."""
    tokens: int = 0
    """Tokens seen in all stages."""
    average_updates: int = 0


def save(
    directory: Path,
    progress: Progress,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> Path:
    """Writes `directory`/step-N, then drops all but the newest checkpoints; returns its path.

    Under its name a checkpoint is on the disk, whole, before an older one goes.
    """
    final = directory / f"{_PREFIX}{progress.step:08d}"
    partial = final.with_suffix(_PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({n: p.detach() for n, p in model.named_parameters()}, partial / _MODEL)
    save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
    if average is not None:
        progress.average_updates = average.num_updates
        save_file(average.weights, partial / _AVERAGE)
    (partial / _STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(directory)
    for old in _complete(directory)[:-_KEPT]:
        shutil.rmtree(old)
    return final


def newest(directory: Path) -> Path:
    """The last complete checkpoint of a run. Raises NotFound without one."""
    found = _complete(directory)
    if not found:
        raise NotFound(f"{directory} holds no checkpoint of a run", reason="FILE_NOT_FOUND")
    return found[-1]


def load(
    checkpoint: Path,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> Progress:
    """Restores everything that `save` wrote, torch's random state included.

    Raises InvalidArgument where the checkpoint is not of this model, DataLoss for damaged files.
    """
    _fill(dict(model.named_parameters()), _read(checkpoint / _MODEL))
    stored = _read(checkpoint / _OPTIMIZER)
    try:
        torch.set_rng_state(stored[_RNG])
        for name, parameter in named_learners(model).items():
            keys = {key: f"{name}.{key}" for key in _MOMENTS}
            if not stored.keys().isdisjoint(keys.values()):  # none: it has not been trained yet
                optimizer.state[parameter] = {key: stored[found] for key, found in keys.items()}
    except KeyError as error:
        raise DataLoss(
            f"{checkpoint / _OPTIMIZER} lacks {error}", reason="CHECKPOINT_CORRUPT"
        ) from None
    try:
        progress = Progress(**json.loads((checkpoint / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataLoss(f"{checkpoint / _STATE}: {error}", reason="CHECKPOINT_CORRUPT") from None
    if average is not None:
        _fill(average.weights, _read(checkpoint / _AVERAGE))
        average.num_updates = progress.average_updates
    return progress


def _optimizer_tensors(
    model: TrainingModel, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Moments and step counts by parameter name and key, and torch's random state."""
    tensors = {_RNG: torch.get_rng_state()}
    for name, parameter in named_learners(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def _complete(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob(f"{_PREFIX}*") if p.suffix != _PARTIAL)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataLoss(f"{file}: {error}", reason="CHECKPOINT_CORRUPT") from None


@torch.no_grad()
def _fill(targets: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    if targets.keys() != stored.keys():
        odd = sorted(targets.keys() ^ stored.keys())
        raise InvalidArgument("resume", f"is of another model: {odd[0]} is in one of both only")
    for name, target in targets.items():
        if target.shape != stored[name].shape:
            raise InvalidArgument("resume", f"is of another model: {name} has another shape")
        target.copy_(stored[name])
