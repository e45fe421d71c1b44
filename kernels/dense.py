"""Products with one stored matrix: `F.linear`, or what is faster for very few rows on a CPU."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from chiasm.kernels import native

MAX_FEW_ROWS = 4
"""Rows of x with which a bfloat16 matrix is read by `chiasm_dense`: with more, torch's product is
as fast."""


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T -> [M, N], of x's dtype.

    Few bfloat16 rows on a CPU take kernels/native/dense.cpp, unless gradients are recorded.
    """
    if not _is_few(x, weight):
        return F.linear(x, weight)
    library = native.library()
    assert library is not None  # or it had no bfloat16
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    first, end, rows = _lists(x.shape[0])
    library.chiasm_dense(
        _pointer(weight),
        *map(ctypes.c_int64, weight.shape),
        _pointer(x),
        ctypes.c_int32(1),
        *map(_pointer, (first, first, end, rows, out)),
        torch.get_num_threads(),
    )
    return out


def _is_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype is torch.bfloat16 is weight.dtype
        and x.device.type == "cpu"
        and x.dim() == 2
        and 0 < x.shape[0] <= MAX_FEW_ROWS
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and native.has_bfloat16()
    )


@functools.cache
def _lists(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One run of all rows through the only matrix, as chiasm_dense wants it told."""
    return (
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([num_rows], dtype=torch.int32),
        torch.arange(num_rows, dtype=torch.int32),
    )


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
