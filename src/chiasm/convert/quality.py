"""Held-out questions asked of the model before and after, side by side in this process.

Both read the same questions with the expected answers behind them, so every next-token distribution
has its twin. A greedy answer is right when each of its tokens, the end included, is the likeliest
one after those before it; so accuracy needs no generation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from chiasm.convert.model import WholeModel
from chiasm.training.data.encode import Encoder
from chiasm.training.data.packing import NO_LABEL, PackedBatch, grouped, pack
from chiasm.training.data.sample import Sample
from chiasm.training.data.stream import held_out
from chiasm.training.data.tasks import TASKS

DTYPE = torch.bfloat16
"""Of both models, but for what is in low precision."""

_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Quality:
    """Sums over questions of a task.

    num_before, num_after: answered exactly. num_tokens: next-token distributions compared, those of
    the whole question and answer. num_agreed: of them, with the same likeliest token. divergence:
    sum of KL(before || after), nats.
    """

    num_questions: int = 0
    num_before: int = 0
    num_after: int = 0
    num_tokens: int = 0
    num_agreed: int = 0
    divergence: float = 0.0

    def __add__(self, other: Quality) -> Quality:
        return Quality(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Quality)))

    @property
    def accuracy_before(self) -> float:
        return _share(self.num_before, self.num_questions)

    @property
    def accuracy_after(self) -> float:
        return _share(self.num_after, self.num_questions)

    @property
    def agreement(self) -> float:
        return _share(self.num_agreed, self.num_tokens)

    @property
    def mean_divergence(self) -> float:
        return _share(self.divergence, self.num_tokens)


def compare(
    before: Path,
    after: Path,
    num_samples: int,
    *,
    tasks: Iterable[str] = tuple(TASKS),
    on_task: Callable[[str], None] = lambda _: None,
) -> dict[str, Quality]:
    """By task, up to `num_samples` held-out questions of each.

    The two checkpoints have the same tokenizer. `on_task` hears the name of each task as it begins.
    """
    encoder = Encoder.load(before)
    models = WholeModel(before, DTYPE), WholeModel(after, DTYPE)
    found = {}
    for task in tasks:
        on_task(task)
        samples = held_out(task, num_samples)
        found[task] = sum((_compared(models, b) for b in batches(encoder, samples)), Quality())
    return found


def batches(encoder: Encoder, samples: Iterable[Sample]) -> Iterator[PackedBatch]:
    """Samples in order, as many to a batch as are sure to fit, or a single longer one."""
    for group in grouped(map(encoder.encode, samples), _BATCH_TOKENS):
        yield pack(group, sum(example.num_tokens for example in group))


def _compared(models: tuple[WholeModel, WholeModel], batch: PackedBatch) -> Quality:
    before, after = (torch.log_softmax(model.logits(batch), dim=-1) for model in models)
    divergence = (before.exp() * (before - after)).sum(dim=-1)  # [T]
    choice_before, choice_after = before.argmax(dim=-1), after.argmax(dim=-1)
    return Quality(
        num_questions=batch.num_examples,
        num_before=_num_right(choice_before, batch),
        num_after=_num_right(choice_after, batch),
        num_tokens=batch.num_tokens,
        num_agreed=int((choice_before == choice_after).sum()),
        divergence=float(divergence.double().sum()),
    )


def _num_right(choices: torch.Tensor, batch: PackedBatch) -> int:
    """Segments whose every labelled row chose its label."""
    is_wrong = (batch.labels != NO_LABEL) & (choices != batch.labels)
    return sum(not bool(part.any()) for part in torch.split(is_wrong, list(batch.lengths)))


def document(found: dict[str, Quality]) -> dict[str, Any]:
    """By task and together, as one JSON object."""
    return {
        task: {
            **dataclasses.asdict(quality),
            "accuracy_before": quality.accuracy_before,
            "accuracy_after": quality.accuracy_after,
            "agreement": quality.agreement,
            "mean_divergence_nats": quality.mean_divergence,
        }
        for task, quality in {**found, "all": sum(found.values(), Quality())}.items()
    }


def table(found: dict[str, Quality]) -> Table:
    """The comparison for a person."""
    view = Table("task", title="held-out questions, before and after", title_justify="left")
    for header in ("n", "before", "after", "same top token", "KL, nats"):
        view.add_column(header, justify="right")
    for task, quality in {**found, "all": sum(found.values(), Quality())}.items():
        view.add_row(
            task,
            str(quality.num_questions),
            f"{quality.accuracy_before:.1%}",
            f"{quality.accuracy_after:.1%}",
            f"{quality.agreement:.2%}",
            f"{quality.mean_divergence:.4f}",
        )
    return view


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
