"""Rotation of the inputs: blocks of 128 along K by signs and a Hadamard matrix.

Weights with heavy tails lose much to two bits. Rotated, each is a sum of 128 and so nearly normal;
the inputs are rotated alike, and because the rotation is orthogonal the products stay the same.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant.formats import ExpertMatrices

BLOCK = 128


@dataclass(frozen=True, slots=True)
class RotatedMatrices:
    """Matrices whose inputs are rotated: `inner` holds rotate(weights), its products rotate(x)."""

    inner: ExpertMatrices

    @property
    def num_experts(self) -> int:
        return self.inner.num_experts

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return rotate_back(self.inner.dequantize(expert, torch.float32)).to(dtype)

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.inner.linear(rotate(x), expert)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., K] in x's dtype, by way of float32. Raises InvalidArgument for a bad K."""
    blocks = _blocks(x) * _signs(x.device)
    return _transform(blocks).reshape(x.shape).to(x.dtype)


def rotate_back(x: torch.Tensor) -> torch.Tensor:
    """Undoes `rotate`: the transform is its own inverse, and so are the signs."""
    blocks = _transform(_blocks(x)) * _signs(x.device)
    return blocks.reshape(x.shape).to(x.dtype)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] % BLOCK:
        raise InvalidArgument("rotated", f"takes a multiple of {BLOCK} inputs, not {x.shape[-1]}")
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)  # there may be no row


def _transform(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [..., 128] times Sylvester's Hadamard matrix, orthonormal.

    By sums and differences rather than by a product of matrices, whose rounding may depend on the
    number of rows: a row's bits are its own, whatever rows stand beside it.
    """
    shape, size = blocks.shape, 1
    while size < BLOCK:
        pairs = blocks.reshape(*shape[:-1], BLOCK // (2 * size), 2, size)
        upper, lower = pairs.unbind(-2)
        blocks = torch.stack((upper + lower, upper - lower), dim=-2)
        size *= 2
    return blocks.reshape(shape) * (1 / math.sqrt(BLOCK))


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    """float32 [128], part of the format: without them a row of equal weights would be one spike."""
    digest = hashlib.sha256(b"chiasm rotation").digest()
    bits = [digest[i // 8] >> (i % 8) & 1 for i in range(BLOCK)]
    return torch.tensor([1.0 - 2.0 * bit for bit in bits], device=device)
