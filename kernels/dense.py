"""Products with one stored matrix: `F.linear`, or what is faster for fewer rows on a CPU."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from chiasm.kernels import native

MAX_FEW_ROWS = 4
"""Rows of x with which a bfloat16 matrix is read by `chiasm_linear`, where torch has bfloat16."""

MAX_UNTILED_ROWS = 2
"""The same, where the processor has tiles."""

MAX_TILED_ROWS = 512
"""Up to which `chiasm_tiles` is faster than torch. Without tiles torch is as fast from
MAX_FEW_ROWS on."""

Lists = tuple["ctypes.Array[ctypes.c_int32]", ...]

DENSE = 3


class Stack(ctypes.Structure):
    """`Stack` of kernels/native/formats.h. Borrows the tensors' memory."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("aux", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T (+ bias [N]) -> [M, N], of x's dtype.

    bfloat16 rows on a CPU, unless there are many or there is a bias, and torch is as fast, take
    kernels/native/dense.cpp or tiles.cpp, but for when gradients are recorded.
    """
    is_torchs = torch.is_grad_enabled() or x.dim() != 2 or x.shape[1] != weight.shape[1]
    if is_torchs or (bias is not None and torch_has_bfloat16()):
        return F.linear(x, weight, bias)
    few = few_rows(x, weight)
    most = MAX_TILED_ROWS if few and native.has_tiles() else few
    if not 0 < x.shape[0] <= most:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    runs, index = _all_rows(x.shape[0])
    take = multiply if x.shape[0] <= few else multiply_by_tiles
    take(stack(weight), x, runs, index, out)
    return out if bias is None else out.add_(bias)


def few_rows(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Rows up to which `multiply` is worth its while; 0 where it does not take the like of x, or
    weight."""
    is_readable = (
        x.dtype is torch.bfloat16 is weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and native.has_bfloat16()
    )
    if not is_readable:
        return 0
    if not torch_has_bfloat16():
        return sys.maxsize
    return MAX_UNTILED_ROWS if native.has_tiles() else MAX_FEW_ROWS


@functools.cache
def torch_has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 with more than one number at a time on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply(
    stack: Stack,
    x: torch.Tensor,
    lists: Lists,
    index: torch.Tensor,
    out: torch.Tensor,
    spent: torch.Tensor | None = None,
) -> None:
    """Runs of few rows of x through the matrices of a stack of any format: `chiasm_linear`.

    x: bfloat16. index: int32. spent: as of `Runs`. All tensors are contiguous.
    """
    library = native.library()
    assert library is not None  # or no rows were few
    library.chiasm_linear(
        ctypes.byref(stack),
        pointer(x),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int32(len(lists[0])),
        *lists,
        *map(pointer, (index, spent, out)),
        torch.get_num_threads(),
    )


def multiply_by_tiles(
    stack: Stack,
    x: torch.Tensor,
    lists: Lists,
    index: torch.Tensor,
    out: torch.Tensor,
    spent: torch.Tensor | None = None,
) -> None:
    """Runs of rows of x through the matrices of a stack of any format: `chiasm_tiles`.

    x: bfloat16. index: int32. spent: as of `Runs`. All tensors are contiguous.
    """
    library = native.library()
    assert library is not None  # or it had no tiles
    library.chiasm_tiles(
        ctypes.byref(stack),
        pointer(x),
        ctypes.c_int32(len(lists[0])),
        *lists,
        *map(pointer, (index, spent, out)),
        torch.get_num_threads(),
    )


def stack(weight: torch.Tensor) -> Stack:
    """Of a contiguous bfloat16 tensor [.., N, K]."""
    return Stack(DENSE, *weight.shape[-2:], weight.data_ptr(), None, None, None)


def lists(runs: Sequence[tuple[int, int, int]]) -> Lists:
    """Of runs (expert, begin, end): all experts, all begins, all ends, as C++ wants them told."""
    return tuple((ctypes.c_int32 * len(runs))(*column) for column in zip(*runs, strict=True))


@functools.lru_cache(maxsize=MAX_TILED_ROWS)
def _all_rows(num_rows: int) -> tuple[Lists, torch.Tensor]:
    """One run of all rows through the only matrix, and its index."""
    index = torch.arange(num_rows, dtype=torch.int32, device="cpu")
    return lists([(0, 0, num_rows)]), index


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Of the first element, as C++ wants it; null of none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
