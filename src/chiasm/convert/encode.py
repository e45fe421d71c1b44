"""One matrix in its new format, and what that cost it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from chiasm.errors import DataLoss
from chiasm.kernels.quant import cpu, int4, int8, tcq2
from chiasm.kernels.quant.formats import ExpertMatrices
from chiasm.kernels.quant.hadamard import BLOCK, rotate
from chiasm.model.expert_weights import FIELDS
from chiasm.model.quantization import ExpertFormat

_ENCODERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], ExpertMatrices]] = {
    "int8": lambda weight, _: int8.encode(weight),
    "int4": int4.encode,
    "tcq2": tcq2.encode,
}
WEIGHED = ("int4", "tcq2")
"""Those whose errors may be weighed by the inputs."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Cost:
    """Sums over weights: their number, squares, squared errors, and the bits that store them."""

    num_weights: int = 0
    energy: float = 0.0
    error: float = 0.0
    num_bits: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    @property
    def mse(self) -> float:
        """Squared error by variance."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error by norm of the weights."""
        return math.sqrt(self.mse)

    @property
    def bits_per_weight(self) -> float:
        """Codes and scales, without names and headers."""
        return self.num_bits / self.num_weights if self.num_weights else 0.0


def encode(
    weight: torch.Tensor,
    form: ExpertFormat,
    importance: torch.Tensor | None,
    *,
    name: str,
    device: torch.device = CPU,
) -> tuple[dict[str, torch.Tensor], Cost]:
    """weight [N, K] -> tensors by field, in the CPU's memory, and the cost.

    importance: float32 [K], the mean squares of the inputs, or None. device: where it is done.
    Raises DataLoss, with the matrix's name, where a weight is not a finite number: codes would make
    one of it.
    """
    weight = weight.to(device).float()
    importance = None if importance is None else importance.to(device)
    if not weight.isfinite().all():
        raise DataLoss(f"{name} has weights that are not finite", reason="CHECKPOINT_CORRUPT")
    target = weight
    if form.is_rotated:
        target = rotate(weight)
        importance = None if importance is None else _mixed(importance)
    matrices = _ENCODERS[form.precision](target[None], importance)
    tensors = {field: getattr(matrices, field)[0].cpu() for field in FIELDS[form.precision]}
    # The rotation keeps lengths, so the error is the same before it and after it.
    error = cpu.widened(matrices, 0, torch.float32) - target
    cost = Cost(
        num_weights=weight.numel(),
        energy=_square_sum(weight),
        error=_square_sum(error),
        num_bits=8 * sum(tensor.nbytes for tensor in tensors.values()),
    )
    return tensors, cost


def _mixed(importance: torch.Tensor) -> torch.Tensor:
    """A rotated input has a share of all squares of its block."""
    return importance.view(-1, BLOCK).mean(dim=1).repeat_interleave(BLOCK)


def _square_sum(values: torch.Tensor) -> float:
    """In float64: large experts have more weights than float32 can count."""
    return float(values.double().square().sum())
