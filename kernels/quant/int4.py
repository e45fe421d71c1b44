"""int4: groups of 128 along K with their own scale and zero, clipped for the least error.

The range of a group's weights is shrunk in steps, and of all ranges the one with the least squared
error is kept: a few outliers are cut so that all others are rounded more finely.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant.formats import GROUP, Int4Matrices

SHRINKS = tuple(1 - 0.04 * i for i in range(12))
"""Shares of the range that are tried."""

_MIDDLE, _LARGEST = 8, 15


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> Int4Matrices:
    """weight: float [E, N, K], K even. importance: [K], weighs the squared errors; None is all one.

    Raises InvalidArgument for another K.
    """
    k = weight.shape[-1]
    if k % 2:
        raise InvalidArgument("weight", f"int4 takes an even number of inputs, not {k}")
    groups = _groups(weight.float())  # [E, N, G, 128], the last one filled up with NaN
    is_there = ~groups.isnan()
    groups = torch.where(is_there, groups, 0.0)
    heed = is_there.float() if importance is None else is_there * _groups(importance.float(), 0.0)
    low = torch.where(is_there, groups, torch.inf).amin(dim=-1)  # [E, N, G]
    high = torch.where(is_there, groups, -torch.inf).amax(dim=-1)
    scale, zero = _best_range(groups, heed, low, high)
    codes = _round(groups, scale, zero).to(torch.uint8).flatten(-2)[..., :k]
    return Int4Matrices(codes[..., 0::2] | (codes[..., 1::2] << 4), scale, zero)


def _best_range(
    groups: torch.Tensor, heed: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero, bfloat16 as they are stored, of the range that errs least."""
    best_error = torch.full_like(low, torch.inf)
    best_scale = best_zero = torch.zeros_like(low, dtype=torch.bfloat16)
    unit = torch.where(high > low, high - low, 1.0)[..., None]  # or small errors square to nothing
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / _LARGEST)).bfloat16()
        zero = (low * shrink + _MIDDLE * scale.float()).bfloat16()
        levels = _round(groups, scale, zero) - _MIDDLE
        error = levels * scale.float()[..., None] + zero.float()[..., None] - groups
        error = ((error / unit).square() * heed).sum(dim=-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_zero = torch.where(is_better, zero, best_zero)
    return best_scale, best_zero


def _round(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 as float, of what is stored rather than of what was meant."""
    step = torch.where(scale > 0, scale, 1).float()[..., None]
    return (torch.round((groups - zero.float()[..., None]) / step) + _MIDDLE).clamp(0, _LARGEST)


def _groups(values: torch.Tensor, filler: float = torch.nan) -> torch.Tensor:
    """[..., K] -> [..., G, 128]."""
    missing = -values.shape[-1] % GROUP
    filled = F.pad(values, (0, missing), value=filler)
    return filled.view(*values.shape[:-1], -1, GROUP)
