"""Whole experts of few low-precision rows on a CPU, in one call.

With a token or a few, an expert's matrices are read in less than a millisecond: what passes between
one product and the next, in Python and until threads have woken up, is a good share of that.
"""

from __future__ import annotations

import ctypes

import torch

from chiasm.kernels import dense, native
from chiasm.kernels.quant.cpu import Runs, most_rows, stack_of
from chiasm.kernels.quant.formats import DenseMatrices, ExpertMatrices


def add_experts(
    hidden: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    runs: Runs,
    weight: torch.Tensor,
    slot: torch.Tensor,
    values: torch.Tensor,
) -> bool:
    """Adds weight[i] * down(silu(gate(x)) * up(x)) to row slot[i] of values, x = hidden[index[i]],
    for every pair i of the runs, by ascending i. Returns False, and does nothing, where the runs or
    the matrices are not what the compiled code takes. Raises ValueError when those that it takes do
    not fit each other.

    hidden: [T, H]. weight: float32 [P]. slot: int64 [P]. values: float32 [N, H].
    """
    longest = max(end - begin for begin, end in zip(runs.begin, runs.end, strict=True))
    first, second = (_stack(matrices, hidden, longest) for matrices in (gate_up, down))
    if first is None or second is None:
        return False
    if hidden.shape[1] != gate_up.shape[1] or gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(f"rows of {hidden.shape[1]} for {gate_up.shape}, then {down.shape}")
    library = native.library()
    assert library is not None  # or no run would have been of few rows
    x, index = hidden.contiguous(), runs.index.contiguous()
    library.chiasm_experts(
        ctypes.byref(first),
        ctypes.byref(second),
        dense.pointer(x),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int32(len(runs.experts)),
        *dense.lists(list(zip(runs.experts, runs.begin, runs.end, strict=True))),
        *map(dense.pointer, (index, runs.spent, weight, slot, values)),
        torch.get_num_threads(),
    )
    return True


def _stack(matrices: ExpertMatrices, hidden: torch.Tensor, longest: int) -> dense.Stack | None:
    """None for what is multiplied in another way. longest: rows of the longest run."""
    if isinstance(matrices, DenseMatrices) or hidden.dtype is not torch.bfloat16:
        return None
    stack = stack_of(matrices)
    return stack if longest <= most_rows(matrices, stack, hidden) else None
