"""Rotates rows block by block, as kernels/quant/hadamard.py states it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rotate_kernel(
    out: tl.tensor,  # [M, K]
    x: tl.tensor,  # [M, K]
    matrix: tl.tensor,  # [BLOCK, BLOCK] of 1 and -1, in x's dtype: products with it are exact
    num_rows: tl.tensor,
    depth: tl.tensor,  # K
    x_row: tl.tensor,  # stride; the last dimension's is 1
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK)
    k = tl.program_id(0) * BLOCK + i
    is_row = row < num_rows
    row = row.to(tl.int64)
    a = tl.load(x + row[:, None] * x_row + k[None, :], mask=is_row[:, None], other=0.0)
    b = tl.load(matrix + i[:, None] * BLOCK + i[None, :])
    value = tl.dot(a, b, input_precision="ieee") * SCALE
    place = out + row[:, None] * depth + k[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_row[:, None])
