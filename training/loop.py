"""The training loop: stages one after the other, each step a function of what came before.

Nothing depends on the clock but what is reported: the same preset and seed give the same weights,
in one go or with interruptions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from chiasm.training import checkpoint
from chiasm.training.checkpoint import Progress
from chiasm.training.data.packing import PackedBatch
from chiasm.training.gradients import accumulate, one_core_each
from chiasm.training.metrics import Records
from chiasm.training.model import TrainingModel
from chiasm.training.optimizer import WeightAverage, build, set_learning_rate
from chiasm.training.presets import Preset, Stage
from chiasm.training.routing import Usage, add_usage

Source = Callable[[Stage, int], Iterator[PackedBatch]]
"""Batches of a stage's stream, from the sample of this index on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A step that was taken. step and tokens count from the run's beginning."""

    step: int
    stage: str
    loss: float
    learning_rate: float
    tokens: int


Watcher = Callable[[StepReport], None]
"""Who is told of every step."""


class Trainer:
    """A run: model, optimiser, average and how far they have come."""

    def __init__(
        self,
        preset: Preset,
        model: TrainingModel,
        source: Source,
        directory: Path,
        *,
        resume: Path | None = None,
    ) -> None:
        """`directory` is the run's; `resume` a checkpoint within it or elsewhere."""
        self.preset, self.model, self._source = preset, model, source
        self._directory, self._checkpoints = directory, directory / "checkpoints"
        self.optimizer = build(model, preset.optimizer)
        decay = preset.optimizer.average_decay
        self.average = WeightAverage(model, decay) if decay else None
        self.progress = Progress()
        if resume is not None:
            self.progress = checkpoint.load(resume, model, self.optimizer, self.average)
        self._usage: Usage = {}
        self._clock, self._clock_tokens = time.monotonic(), self.progress.tokens

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What to export: the average where one is kept."""
        if self.average is not None:
            return self.average.weights
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def run(self, watch: Watcher, *, max_steps: int | None = None) -> None:
        """Trains to the end of the last stage, or `max_steps` more; saves where it ends."""
        last = None if max_steps is None else self.progress.step + max_steps
        self.model.train()
        with (
            Records(self._directory, resumed_at=self.progress.step) as records,
            one_core_each(self.preset.micro_batches) as pool,
        ):
            while self.progress.stage < len(self.preset.stages) and self.progress.step != last:
                stage = self.preset.stages[self.progress.stage]
                self._stage(stage, watch, records, pool, last)
        self.save()

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        return checkpoint.save(
            self._checkpoints, self.progress, self.model, self.optimizer, self.average
        )

    def _stage(
        self,
        stage: Stage,
        watch: Watcher,
        records: Records,
        pool: ThreadPoolExecutor,
        last: int | None,
    ) -> None:
        progress = self.progress
        self.model.train_only(stage.trains)
        batches = self._source(stage, progress.next_sample)
        while progress.stage_step < stage.schedule.steps and progress.step != last:
            parts = list(itertools.islice(batches, self.preset.micro_batches))
            rate = stage.schedule.learning_rate(progress.stage_step)
            values = self._step(parts, stage, rate, pool)
            progress.stage_step += 1
            progress.step += 1
            progress.next_sample += sum(part.num_examples for part in parts)
            progress.tokens += sum(part.num_tokens for part in parts)
            watch(
                StepReport(
                    step=progress.step,
                    stage=stage.name,
                    loss=values["loss"],
                    learning_rate=rate,
                    tokens=progress.tokens,
                )
            )
            if progress.step % self.preset.log_every == 0:
                self._log(records, stage, rate, values)
            if progress.step % self.preset.checkpoint_every == 0:
                self.save()
        if progress.stage_step == stage.schedule.steps:
            progress.stage, progress.stage_step, progress.next_sample = progress.stage + 1, 0, 0

    def _step(
        self, parts: Sequence[PackedBatch], stage: Stage, rate: float, pool: ThreadPoolExecutor
    ) -> dict[str, float]:
        """One update; returns the values of the loss's terms and the gradient's norm."""
        objective, config = self.preset.objective, self.preset.optimizer
        result = accumulate(
            self.model,
            objective,
            parts,
            pool,
            detach_text=stage.detach_text,
            sight_alone=stage.sight_alone,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        objective.after_step(self.model, result.by_gate, rate)
        if self.average is not None and (self.progress.step + 1) % config.average_every == 0:
            self.average.update(self.model)
        add_usage(self._usage, result.by_modality)
        return {**result.values, "grad_norm": float(norm)}

    def _log(self, records: Records, stage: Stage, rate: float, values: dict[str, float]) -> None:
        now, tokens = time.monotonic(), self.progress.tokens
        speed = (tokens - self._clock_tokens) / max(now - self._clock, 1e-9)
        self._clock, self._clock_tokens = now, tokens
        row: dict[str, float | int | str] = {
            "step": self.progress.step,
            "stage": stage.name,
            "tokens": tokens,
            "learning_rate": rate,
            "tokens_per_s": speed,
            **values,
        }
        records.write(row, self._usage)
        self._usage = {}
