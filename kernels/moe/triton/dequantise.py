"""Writes out the weights that codes stand for, in the dtype of the products to come.

One program, one expert's BLOCK_N rows of one group of 128. Values are worked out in float32 and
rounded once. Experts without tokens are left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chiasm.kernels.moe.triton.product import GROUP, tcq2_bytes, tcq2_window


@triton.jit(do_not_specialize=["starts"])
def dequantise_kernel(
    out: tl.tensor,  # [E, N, K]
    starts: tl.tensor,  # int32 [E + 1]: first place of each expert's pairs
    codes: tl.tensor,  # [E, N, K], see operands.py
    group_scale: tl.tensor,
    group_zero: tl.tensor,
    row_scale: tl.tensor,
    table: tl.tensor,
    width: tl.tensor,  # N
    depth: tl.tensor,  # K
    codes_row: tl.tensor,  # stride of a row of codes
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    group, expert = tl.program_id(0), tl.program_id(2)
    if tl.load(starts + expert) == tl.load(starts + expert + 1):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = group * GROUP + tl.arange(0, GROUP)
    is_row = n < width
    is_weight = is_row[:, None] & (k < depth)[None, :]
    row = expert.to(tl.int64) * width + n
    scale_at = row * tl.cdiv(depth, GROUP) + group
    scale = tl.load(group_scale + scale_at, mask=is_row, other=0).to(tl.float32)
    if FORMAT == "int4":
        at = codes + row[:, None] * codes_row + (k // 2)[None, :]
        q = tl.load(at, mask=is_weight, other=0).to(tl.int32)
        q = ((q >> (4 * (k % 2))[None, :]) & 15) - 8
        zero = tl.load(group_zero + scale_at, mask=is_row, other=0.0).to(tl.float32)
        value = q.to(tl.float32) * scale[:, None] + zero[:, None]
    else:
        at = codes + row[:, None] * codes_row
        this, last = tcq2_bytes(at, (k // 4)[None, :], is_weight)
        window = tcq2_window(this, last)
        level = tl.load(table + ((window >> (6 - 2 * (k % 4))[None, :]) & 255))
        step = tl.load(row_scale + row, mask=is_row, other=0.0)
        value = level.to(tl.float32) * scale[:, None] * step[:, None]
    place = out + row[:, None] * depth + k[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_weight)
