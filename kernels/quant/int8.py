"""int8: each row of a matrix has one scale; nothing is measured but the row's largest value."""

from __future__ import annotations

import torch

from chiasm.kernels.quant.formats import Int8Matrices

_LARGEST = 127


def encode(weight: torch.Tensor) -> Int8Matrices:
    """weight: float [E, N, K]. Rounds to nearest; scale is the row's largest magnitude / 127."""
    weight = weight.float()
    scale = weight.abs().amax(dim=-1) / _LARGEST  # [E, N]
    codes = torch.round(weight / _not_zero(scale)[..., None]).clamp(-_LARGEST, _LARGEST)
    return Int8Matrices(codes.to(torch.int8), scale)


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, 1.0)
