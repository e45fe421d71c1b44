"""WINT2, the two-bit format of Baidu's published checkpoints; it is read, never written.

A byte holds four weights: an affine map of the output channel makes a code of 15 bits of it, whose
overlapping windows of 6 bits are the weights. Source: FastDeploy, `wint2x_unzip.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from chiasm.kernels.quant.formats import CodedMatrices

GROUP = 64
"""Weights along K that share a local scale of 4 bits."""

_SHIFTS = (9, 6, 3, 0)
_WINDOW, _MIDDLE = 63, 32


@dataclass(frozen=True, slots=True)
class Wint2Matrices(CodedMatrices):
    """Stored with K first on disk, here with N first, as all stacks.

    codes: uint8 [E, N, K/4]; local: uint8 [E, N, K/128], the even group of 64 in the high nibble;
    code_scale, code_zp, super_scale: float32 [E, N].
    """

    PER_CODE: ClassVar[int] = 4

    local: torch.Tensor
    code_scale: torch.Tensor
    code_zp: torch.Tensor
    super_scale: torch.Tensor

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: window * local scale is a whole number; times super_scale it is rounded once."""
        scale, zero = (t[expert][:, None] for t in (self.code_scale, self.code_zp))
        code = (self.codes[expert].float() * scale + zero + 0.5).floor().int()  # [N, K/4]
        windows = torch.stack([code >> shift & _WINDOW for shift in _SHIFTS], dim=-1) - _MIDDLE
        local = self.local[expert].int()
        nibbles = torch.stack([local >> 4, local & 15], dim=-1).flatten(-2)  # [N, K/64]
        whole = windows.flatten(-2) * nibbles.repeat_interleave(GROUP, dim=-1)
        return (whole.float() * self.super_scale[expert][:, None]).to(dtype)
