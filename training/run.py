"""A whole run, from a preset's name to a checkpoint that serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer

from chiasm.alone import alone
from chiasm.errors import ChiasmError, InvalidArgument, NotFound
from chiasm.model.config import ModelConfig
from chiasm.training import checkpoint, presets
from chiasm.training.data import tokenizer
from chiasm.training.data.packing import Batches, PackedBatch
from chiasm.training.data.stream import Stream
from chiasm.training.export import adopt, describe, export
from chiasm.training.loop import Source, Trainer, Watcher
from chiasm.training.metrics import plot
from chiasm.training.model import TrainingModel, initialize
from chiasm.training.presets import Preset, Stage

RUN = "run.json"
"""What says how a run began; there from its beginning on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What decides a run's result; kept beside its checkpoints."""

    preset: str = "bundled"
    ablation: str | None = None
    stage: str | None = None
    """Only this stage."""
    model: str | None = None
    """Directory of the checkpoint to begin with; without one, weights are drawn."""
    seed: int = 0
    recipe: str | None = None
    """Digest of the preset as the run began with it; none in runs from before it was kept."""

    def find(self) -> Preset:
        return presets.find(self.preset, self.ablation, self.stage)


def start(directory: Path, config: RunConfig) -> Trainer:
    """A new run in `directory`. Raises InvalidArgument where there is one already, and what
    Checkpoint raises for a model that it cannot begin with."""
    preset = config.find()
    if directory.exists() and any(directory.iterdir()):
        raise InvalidArgument("out", f"{directory} is not empty; --resume goes on with a run")
    words = tokenizer.train() if config.model is None else _words_of(Path(config.model))
    description = describe(directory / "description", preset.dimensions, words, dtype="bfloat16")
    model = _model(preset, description)
    try:
        _begin(model, config)
    except ChiasmError:
        shutil.rmtree(directory / "description")  # or the next try would not find it empty
        raise
    begun = replace(config, recipe=preset.digest)
    (directory / RUN).write_text(json.dumps(asdict(begun), indent=2) + "\n")
    return Trainer(preset, model, _source(directory, config.seed), directory)


def resume(directory: Path) -> Trainer:
    """Goes on from the newest checkpoint of the run in `directory`; without one, from the start.

    Raises InvalidArgument where there is no run, its preset is not what it was when the run began,
    or a checkpoint is not one of this run.
    """
    try:
        config = RunConfig(**json.loads((directory / RUN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgument("resume", f"{directory / RUN}: {error}") from None
    preset = config.find()
    if config.recipe not in (None, preset.digest):
        raise InvalidArgument(
            "resume",
            f"{directory} began with another recipe than the preset {config.preset!r} has now; "
            "the chiasm that began it can go on with it",
        )
    model = _model(preset, ModelConfig.load(directory / "description"))
    newest: Path | None
    try:
        newest = checkpoint.newest(directory / "checkpoints")
    except NotFound:
        newest = None
        _begin(model, config)
    return Trainer(preset, model, _source(directory, config.seed), directory, resume=newest)


def train(
    trainer: Trainer, directory: Path, watch: Watcher, *, max_steps: int | None = None
) -> Path:
    """Runs to the end, or `max_steps` more; writes the serving checkpoint `directory`/model, and
    plots where matplotlib is installed. Returns the checkpoint's path.

    Raises FailedPrecondition while another process is at this run.
    """
    out = directory / "model"
    with alone(directory, "writing to"):
        trainer.run(watch, max_steps=max_steps)
        export(
            trainer.model,
            trainer.weights,
            directory / "description",
            out,
            shard_bytes=trainer.preset.dimensions.shard_bytes,
        )
        if find_spec("matplotlib") is not None:
            plot(directory)
    return out


def _model(preset: Preset, config: ModelConfig) -> TrainingModel:
    return TrainingModel(config, shared_pool=preset.shared_pool, dtype=torch.bfloat16)


def _words_of(model: Path) -> Tokenizer:
    file = model / "tokenizer.json"
    if not file.is_file():
        raise InvalidArgument("model", f"{file} is not there")
    return Tokenizer.from_file(str(file))


def _begin(model: TrainingModel, config: RunConfig) -> None:
    initialize(model, config.seed)
    if config.model is not None:
        adopt(model, Path(config.model))


def _source(directory: Path, seed: int) -> Source:
    """Batches of the tasks, made by a process of their own, for the run's seed."""

    def batches(stage: Stage, first_sample: int) -> Iterator[PackedBatch]:
        return Batches(
            stream=Stream(stage.mix, seed=seed, lessons=stage.lessons),
            checkpoint=directory / "description",
            max_tokens=stage.batch_tokens,
            start=first_sample,
        ).in_background()

    return batches
