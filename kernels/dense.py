"""Products with one stored matrix: `F.linear`, or what is faster for very few rows on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from chiasm.kernels import native

MAX_FEW_ROWS = 4
"""Rows of x with which a bfloat16 matrix is read by `chiasm_dense`: with more, torch's product is
as fast."""

Lists = tuple["ctypes.Array[ctypes.c_int32]", ...]


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T -> [M, N], of x's dtype.

    Few bfloat16 rows on a CPU take kernels/native/dense.cpp, unless gradients are recorded.
    """
    few = x.dim() == 2 and 0 < x.shape[0] <= MAX_FEW_ROWS and not torch.is_grad_enabled()
    if not few or not is_readable(x, weight):
        return F.linear(x, weight)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    multiply(x, weight, *_all_rows(x.shape[0]), out)
    return out


def is_readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `multiply` takes them on this machine."""
    return (
        x.dtype is torch.bfloat16 is weight.dtype
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and native.has_bfloat16()
    )


def multiply(
    x: torch.Tensor, weight: torch.Tensor, lists: Lists, index: torch.Tensor, out: torch.Tensor
) -> None:
    """Runs of few rows of x through the matrices of weight [.., N, K]: `chiasm_dense`.

    index: int32. All tensors are contiguous.
    """
    library = native.library()
    assert library is not None  # or it had no bfloat16
    library.chiasm_dense(
        pointer(weight),
        *map(ctypes.c_int64, weight.shape[-2:]),
        pointer(x),
        ctypes.c_int32(len(lists[0])),
        *lists,
        *map(pointer, (index, out)),
        torch.get_num_threads(),
    )


def lists(runs: Sequence[tuple[int, int, int]]) -> Lists:
    """Of runs (expert, begin, end): all experts, all begins, all ends, as C++ wants them told."""
    return tuple((ctypes.c_int32 * len(runs))(*column) for column in zip(*runs, strict=True))


@functools.cache
def _all_rows(num_rows: int) -> tuple[Lists, torch.Tensor]:
    """One run of all rows through the only matrix, and its index."""
    return lists([(0, 0, num_rows)]), torch.arange(num_rows, dtype=torch.int32)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Of the first element, as C++ wants it."""
    return ctypes.c_void_p(tensor.data_ptr())
