"""A shard's partial of few rows on a CPU, in one call.

With a token or a few, an expert's matrices are read in less than a millisecond: what passes between
one product and the next, in Python and until threads have woken up, is a good share of that.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch

from chiasm.kernels import dense, native
from chiasm.kernels.moe import scratch
from chiasm.kernels.moe.reference import ShardWeights
from chiasm.kernels.quant.cpu import most_rows, stack_of
from chiasm.kernels.quant.formats import ExpertMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices


@dataclass(frozen=True, slots=True)
class _Side:
    """One of an expert's two matrices, as C++ wants them told."""

    matrices: ExpertMatrices
    stack: dense.Stack

    def most_rows(self, hidden: torch.Tensor) -> int:
        """Of one expert, up to which they are few."""
        return most_rows(self.matrices, self.stack, hidden)


_known: weakref.WeakKeyDictionary[ShardWeights, tuple[_Side, _Side] | None] = (
    weakref.WeakKeyDictionary()
)


def partial_of_few(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
    spent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As kernels.moe.shard_partial, of rows that are rotated where gate and up are; None where the
    rows or the matrices are not what the compiled code takes.

    Raises ValueError when what it takes does not fit together: nothing is read that is not there.
    """
    if weights not in _known:
        _known[weights] = _sides(weights)
    sides, (num_tokens, k) = _known[weights], expert_ids.shape
    if sides is None or hidden.dtype is not torch.bfloat16:
        return None
    gate_up, down = sides
    is_bounded = num_tokens * k * _pair_bytes(down.stack) <= scratch.SCRATCH_BYTES
    most = min(gate_up.most_rows(hidden), down.most_rows(hidden)) if is_bounded else 0
    if not most:
        return None
    shapes = hidden.shape, expert_ids.shape, expert_weights.shape
    if shapes != ((num_tokens, gate_up.stack.k), (num_tokens, k), (num_tokens, k)):
        raise ValueError(f"{[*map(tuple, shapes)]} for matrices of {gate_up.stack.k} columns")
    library = native.library()
    assert library is not None  # or no rows were few
    library.chiasm_experts.restype = ctypes.c_int64
    x, share = hidden.contiguous(), expert_weights.float().contiguous()
    ids = expert_ids.to(torch.int32).contiguous()
    rows = torch.empty(num_tokens, dtype=torch.int32)
    values = torch.empty(num_tokens, down.stack.n)
    num_rows = library.chiasm_experts(
        ctypes.byref(gate_up.stack),
        ctypes.byref(down.stack),
        dense.pointer(x),
        ctypes.c_int64(num_tokens),
        *map(dense.pointer, (ids, share)),
        ctypes.c_int64(k),
        ctypes.c_int32(weights.first),
        ctypes.c_int32(weights.num_experts),
        ctypes.c_int64(most),
        *map(dense.pointer, (spent, rows, values)),
        torch.get_num_threads(),
    )
    if num_rows < 0:
        return None
    return (rows, values) if num_rows == num_tokens else (rows[:num_rows], values[:num_rows])


def _sides(weights: ShardWeights) -> tuple[_Side, _Side] | None:
    gate_up, down = weights.gate_up, weights.down
    if isinstance(gate_up, RotatedMatrices):
        gate_up = gate_up.inner
    upper, lower = stack_of(gate_up), stack_of(down)
    if upper is None or lower is None:
        return None
    if upper.n != 2 * lower.k:
        raise ValueError(f"matrices of {upper.n} rows, then of {lower.k} columns")
    return _Side(gate_up, upper), _Side(down, lower)


def _pair_bytes(down: dense.Stack) -> int:
    """Held for each pair: gate, up, inner row, as laid out for down too, and result."""
    return 10 * int(down.k) + 2 * int(down.n)
