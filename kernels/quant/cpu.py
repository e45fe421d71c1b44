"""Products with stacks of matrices on a CPU: which way is fastest for how many rows.

Few bfloat16 rows are multiplied with the codes as they are stored (kernels/native/linear.cpp), so
that a matrix is read once and in its few bits; all of them are, where torch has no products of
bfloat16. For many, processors with tiles (AMX) widen a matrix piece by piece in their cache
(kernels/native/tiles.cpp). Elsewhere, and for float32, a matrix is widened first and multiplied by
torch; one widened matrix is held at a time, and none is kept. A row's result depends on the rows of
its own run alone, never on the other runs.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from chiasm.kernels import dense, native
from chiasm.kernels.quant.formats import (
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
)
from chiasm.kernels.quant.hadamard import RotatedMatrices, rotate

MAX_FUSED_ROWS: Mapping[type[ExpertMatrices], int] = {
    Int8Matrices: 48,
    Int4Matrices: 24,
    Tcq2Matrices: 48,
}
"""Of a run: with more, to widen the matrix costs less than to read its codes for every few rows."""

MAX_UNTILED_ROWS: Mapping[type[ExpertMatrices], int] = {
    Int8Matrices: 10,
    Int4Matrices: 6,
    Tcq2Matrices: 8,
}
"""The same, where the processor has tiles."""

_INT8, _INT4, _TCQ2 = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Rows by expert: `index[begin[r]:end[r]]` go through the matrix of `experts[r]`.

    index: int32 [P]. The runs are disjoint and together all of it. spent: int64 [E], to which the
    nanoseconds that each expert's products take are added.
    """

    experts: Sequence[int]
    begin: Sequence[int]
    end: Sequence[int]
    index: torch.Tensor
    spent: torch.Tensor | None = None


def linear(matrices: ExpertMatrices, x: torch.Tensor, expert: int) -> torch.Tensor:
    """x [M, K] @ one matrix^T -> [M, N]."""
    index = torch.arange(x.shape[0], dtype=torch.int32)
    return grouped_linear(
        matrices, x, Runs(experts=(expert,), begin=(0,), end=(x.shape[0],), index=index)
    )


def grouped_linear(matrices: ExpertMatrices, x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """x [T, K] -> [P, N]: row i is x[index[i]] @ matrix^T of its run's expert.

    Raises ValueError when x has not as many columns as the matrices.
    """
    if x.shape[1] != matrices.shape[1]:
        raise ValueError(f"rows of {x.shape[1]} for matrices of {matrices.shape[1]} columns")
    if isinstance(matrices, RotatedMatrices):
        return grouped_linear(matrices.inner, rotate(x), runs)
    out = x.new_empty(runs.index.numel(), matrices.shape[0])
    stack = stack_of(matrices) if x.device.type == "cpu" and x.dtype is torch.bfloat16 else None
    few, many = _by_length(runs, most_rows(matrices, stack, x))
    index = runs.index.contiguous()
    if many and stack is not None and native.has_tiles():
        dense.multiply_by_tiles(stack, x.contiguous(), dense.lists(many), index, out, runs.spent)
    else:
        for expert, begin, end in many:
            start = time.monotonic_ns()
            weight = widened(matrices, expert, x.dtype)
            torch.mm(x[index[begin:end]], weight.t(), out=out[begin:end])
            if runs.spent is not None:
                runs.spent[expert] += time.monotonic_ns() - start
    if few:
        if many:
            x, index = _only_read(x, index, few)
        assert stack is not None  # or no run was of few rows
        dense.multiply(stack, x.contiguous(), dense.lists(few), index, out, runs.spent)
    return out


def most_rows(matrices: ExpertMatrices, stack: dense.Stack | None, x: torch.Tensor) -> int:
    """Rows of a run up to which the compiled products are there and worth their while."""
    if isinstance(matrices, DenseMatrices):
        return dense.few_rows(x, matrices.weight)
    if stack is None or native.library() is None:
        return 0
    if native.lanes() and not dense.torch_has_bfloat16():
        return sys.maxsize
    return (MAX_UNTILED_ROWS if native.has_tiles() else MAX_FUSED_ROWS)[type(matrices)]


def _by_length(
    runs: Runs, most: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Runs (expert, begin, end) of up to `most` rows, and of more; those of none are in neither."""
    few: list[tuple[int, int, int]] = []
    many: list[tuple[int, int, int]] = []
    for run in zip(runs.experts, runs.begin, runs.end, strict=True):
        if num_rows := run[2] - run[1]:
            (few if num_rows <= most else many).append(run)
    return few, many


def _only_read(
    x: torch.Tensor, index: torch.Tensor, runs: Sequence[tuple[int, int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that some runs read, and where `index` finds them: the products lay out every row
    that they are given, which under skewed routing are mostly rows of other runs."""
    is_read = torch.zeros(x.shape[0], dtype=torch.bool)
    for _, begin, end in runs:
        is_read[index[begin:end]] = True
    place = is_read.cumsum(0, dtype=torch.int32) - 1
    return x[is_read], place[index]


def widened(matrices: ExpertMatrices, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """`matrices.dequantize(expert, dtype)`, the same bits, by the fastest way there is."""
    stack = None if isinstance(matrices, DenseMatrices) else stack_of(matrices)
    library = native.library() if stack is not None else None
    if stack is None or library is None or dtype not in (torch.float32, torch.bfloat16):
        return matrices.dequantize(expert, dtype)
    rows, width = matrices.shape
    out = torch.empty(rows, width, dtype=dtype)
    decode = (
        library.chiasm_decode_float32 if dtype is torch.float32 else library.chiasm_decode_bfloat16
    )
    decode(
        ctypes.byref(stack),
        ctypes.c_int64(expert * rows),
        ctypes.c_int64(rows),
        dense.pointer(out),
        torch.get_num_threads(),
    )
    return out


def stack_of(matrices: ExpertMatrices) -> dense.Stack | None:
    """What the C++ needs to know; None for what it does not read. Borrows the tensors' memory."""
    tensors: tuple[torch.Tensor, ...]
    if isinstance(matrices, DenseMatrices) and matrices.weight.dtype is torch.bfloat16:
        kind, tensors = dense.DENSE, (matrices.weight,)
    elif isinstance(matrices, Int8Matrices):
        kind, tensors = _INT8, (matrices.codes, matrices.scale)
    elif isinstance(matrices, Int4Matrices):
        kind, tensors = _INT4, (matrices.codes, matrices.scale, matrices.zero)
    elif isinstance(matrices, Tcq2Matrices):
        kind, tensors = _TCQ2, (matrices.codes, matrices.row, matrices.local, matrices.table)
    else:
        return None
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors):
        return None
    return dense.Stack(kind, *matrices.shape, *(t.data_ptr() for t in tensors))
