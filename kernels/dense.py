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
    few = x.dim() == 2 and 0 < x.shape[0] <= MAX_FEW_ROWS and not torch.is_grad_enabled()
    if not few or not is_readable(x, weight):
        return F.linear(x, weight)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    first, end, rows = _lists(x.shape[0])
    multiply(x, weight, 1, first, first, end, rows, out)
    return out


def is_readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `multiply` takes them on this machine."""
    return (
        x.dtype is torch.bfloat16 is weight.dtype
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and native.library() is not None
        and native.has_bfloat16()
    )


def multiply(x: torch.Tensor, weight: torch.Tensor, num_runs: int, *lists: torch.Tensor) -> None:
    """Runs of few rows of x through the matrices of weight [.., N, K]: `chiasm_dense`.

    lists: int32 experts, begins, ends and index, then out, all contiguous.
    """
    library = native.library()
    assert library is not None  # or it had no bfloat16
    library.chiasm_dense(
        pointer(weight),
        *map(ctypes.c_int64, weight.shape[-2:]),
        pointer(x),
        ctypes.c_int32(num_runs),
        *map(pointer, lists),
        torch.get_num_threads(),
    )


@functools.cache
def _lists(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One run of all rows through the only matrix, as chiasm_dense wants it told."""
    return (
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([num_rows], dtype=torch.int32),
        torch.arange(num_rows, dtype=torch.int32),
    )


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Of the first element, as C++ wants it."""
    return ctypes.c_void_p(tensor.data_ptr())
