"""The gradients of one step: its micro-batches side by side, one thread and one core each.

A step is thousands of small operations. Cutting each of them between cores costs more than it
gains, and waits for the slowest core every time; whole passes are independent. Python's lock is
free while torch computes. Sums are taken in the order of the micro-batches, so the result does not
depend on how fast a thread is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from chiasm.training.data.packing import PackedBatch
from chiasm.training.model import Part, TrainingModel, part_of
from chiasm.training.objective import Objective, Whole, sight_loss
from chiasm.training.routing import Usage, add_usage, choices_by_gate, choices_by_modality


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step's passes gave besides gradients.

    values: terms of the loss by name. by_gate, by_modality: choices per expert.
    """

    values: dict[str, float]
    by_gate: Usage
    by_modality: Usage


_SWITCH_S = 1e-4
"""A thread that computes in Python hands the lock on after this time; 5 ms, the default, is longer
than most operations that the other one has waiting."""


@contextmanager
def one_core_each(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose torch operations do not spread over cores, nor do the caller's meanwhile."""
    before, patience = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(_SWITCH_S)
    try:
        with ThreadPoolExecutor(num_threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
        sys.setswitchinterval(patience)


def accumulate(
    model: TrainingModel,
    objective: Objective,
    parts: Sequence[PackedBatch],
    pool: ThreadPoolExecutor,
    *,
    detach_text: bool = False,
    sight_alone: bool = False,
) -> StepResult:
    """Sets the gradients of all parameters that learn to those of the whole step.

    With `detach_text` the text parameters get none from micro-batches that have media: ERNIE's
    modality detach. With `sight_alone` it is the probes that are asked, and no text is run.
    """
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = Whole.of(parts)
    if sight_alone:
        one = partial(_sight_pass, model, learners, whole)
    else:
        one = partial(_pass, model, objective, learners, whole, detach_text)
    results, gradients = zip(*pool.map(one, parts), strict=True)
    for parameter, *own in zip(learners.values(), *gradients, strict=True):
        present = [gradient for gradient in own if gradient is not None]
        parameter.grad = present[0] if present else None
        for other in present[1:]:
            present[0].add_(other)
    return _sum(results)


def _pass(
    model: TrainingModel,
    objective: Objective,
    learners: dict[str, torch.nn.Parameter],
    whole: Whole,
    detach_text: bool,
    batch: PackedBatch,
) -> tuple[StepResult, list[torch.Tensor | None]]:
    """One micro-batch, there and back."""
    passed = model(batch)
    loss, values = objective.loss(model, batch, passed, whole)
    found = torch.autograd.grad(loss, list(learners.values()), allow_unused=True)
    is_detached = detach_text and bool(batch.grids)
    gradients = [
        None if is_detached and part_of(name) is Part.TEXT else gradient
        for name, gradient in zip(learners, found, strict=True)
    ]
    num_experts = model.config.text.num_experts
    result = StepResult(
        values=values,
        by_gate=choices_by_gate(passed.records, num_experts),
        by_modality=choices_by_modality(passed.records, batch.token_types, num_experts),
    )
    return result, gradients


def _sight_pass(
    model: TrainingModel,
    learners: dict[str, torch.nn.Parameter],
    whole: Whole,
    batch: PackedBatch,
) -> tuple[StepResult, list[torch.Tensor | None]]:
    """One micro-batch through ViT, adapter and probes, there and back."""
    loss = sight_loss(model, batch, whole)
    gradients = torch.autograd.grad(loss, list(learners.values()), allow_unused=True)
    result = StepResult(values={"loss": float(loss.detach())}, by_gate={}, by_modality={})
    return result, [*gradients]


def _sum(results: Sequence[StepResult]) -> StepResult:
    values: dict[str, float] = {}
    by_gate: Usage = {}
    by_modality: Usage = {}
    for result in results:
        for name, value in result.values.items():
            values[name] = values.get(name, 0.0) + value
        add_usage(by_gate, result.by_gate)
        add_usage(by_modality, result.by_modality)
    return StepResult(values=values, by_gate=by_gate, by_modality=by_modality)
