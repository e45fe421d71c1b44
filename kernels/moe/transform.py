"""What matrices and rows go through before a product: codes become weights, rows are rotated."""

from __future__ import annotations

import functools

import torch

from chiasm.kernels.moe.operands import Operands
from chiasm.kernels.quant.formats import GROUP
from chiasm.kernels.quant.hadamard import BLOCK, rotate

DEQUANTISE_ROWS = 32
ROTATE_ROWS = 32


def dequantise(matrices: Operands, starts: torch.Tensor, dtype: torch.dtype) -> Operands:
    """int4 or tcq2 as weights of `dtype`; those of experts without pairs are left undefined.

    starts: int32 [E + 1], the first place of each expert's pairs.
    """
    from chiasm.kernels.moe.triton import dequantise as kernels

    rows, depth = matrices.shape
    out = matrices.codes.new_empty(matrices.num_experts, rows, depth, dtype=dtype)
    grid = (-(-depth // GROUP), -(-rows // DEQUANTISE_ROWS), matrices.num_experts)
    kernels.dequantise_kernel[grid](
        out,
        starts,
        *matrices.arguments,
        rows,
        depth,
        matrices.codes.stride(1),
        FORMAT=matrices.format,
        BLOCK_N=DEQUANTISE_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Operands(format="dense", shape=matrices.shape, codes=out)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """`hadamard.rotate` of rows [M, K]; a row's bits do not depend on the others."""
    from chiasm.kernels.moe.triton import rotate as kernels

    num_rows, depth = x.shape
    out = x.new_empty(num_rows, depth)
    kernels.rotate_kernel[(depth // BLOCK, -(-num_rows // ROTATE_ROWS))](
        out,
        x,
        _signed_matrix(x.device, x.dtype),
        num_rows,
        depth,
        x.stride(0),
        SCALE=BLOCK**-0.5,
        BLOCK=BLOCK,
        BLOCK_M=ROTATE_ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@functools.cache
def _signed_matrix(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The rotation of one block, but for its scale: 1 and -1, [128, 128]."""
    return rotate(torch.eye(BLOCK)).sign().to(device, dtype)
