"""SiLU of the gate times up, on a CPU."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from chiasm.kernels import native
from chiasm.kernels.dense import pointer


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [P, 2I], gate before up, -> [P, I], of the same dtype.

    Of bfloat16, silu is rounded before it is multiplied, here as in torch.
    """
    library = native.library() if gate_up.dtype is torch.bfloat16 else None
    if library is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    library.chiasm_swiglu(
        pointer(gate_up),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        pointer(out),
        torch.get_num_threads(),
    )
    return out
