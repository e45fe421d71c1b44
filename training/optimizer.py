"""AdamW over the model's parameters, its learning rates, and the moving average of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from chiasm.training.model import Part, TrainingModel, part_of


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Betas, epsilon and decay are those of ERNIE's own configuration."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gate_scale: float = 1.0
    """Gates' learning rate over that of the rest. ERNIE's configuration for fine-tuning has 0.01;
    gates that begin with nothing, as in every preset, have to learn like all else."""
    vit_scale: float = 1.0
    """The ViT's learning rate over that of the rest; 0.9 there, and less for its lower layers."""
    clip_norm: float = 1.0
    average_decay: float = 0.99
    """Of the moving average, per update; 0: no average is kept."""
    average_every: int = 10
    """Steps between updates of the average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then a cosine down to `floor` at the last step."""

    steps: int
    warmup: int
    peak: float
    floor: float

    def learning_rate(self, step: int) -> float:
        """Of step 0..steps-1."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - 1 - self.warmup, 1)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def named_learners(model: TrainingModel) -> dict[str, nn.Parameter]:
    """Every parameter that gradients may move in some stage; correction biases are not among
    them."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.endswith("e_score_correction_bias")
        and not (model.shared_pool and name.endswith("gate.weight_1"))
    }


def build(model: TrainingModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups by learning-rate scale and by decay: matrices decay, norms and biases do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_learners(model).items():
        is_gate = name.endswith(("gate.weight", "gate.weight_1"))
        is_vit = part_of(name) is Part.VIT
        scale = config.gate_scale if is_gate else config.vit_scale if is_vit else 1.0
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group to `rate` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class WeightAverage:
    """Exponential moving average of all parameters, correction biases included.

    Until the average has seen 1 / (1 - decay) updates it is the plain mean of them.
    """

    def __init__(self, model: TrainingModel, decay: float) -> None:
        self._decay = decay
        self.num_updates = 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: TrainingModel) -> None:
        decay = min(self._decay, self.num_updates / (self.num_updates + 1))
        for average, parameter in zip(self.weights.values(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)
        self.num_updates += 1
