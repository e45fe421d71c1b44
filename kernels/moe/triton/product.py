"""Products of a tile of rows with one expert's matrix, per format: x [M, K] times w [N, K]^T.

The matrix stays as it is stored. Codes of all formats are small integers, exact in every dtype of
x; scales are applied in float32, to the sums. In the formats with groups, the weights along K that
share a scale are one step of the loop. Their codes make planes: of n weights to a byte, plane j
holds the weights j, j + n, j + 2n ...; x is taken apart in the same way, so that weights need not
be interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(128)


@triton.jit
def product(
    x: tl.tensor,  # [M] pointers to rows
    is_row: tl.tensor,  # [M]
    depth: tl.tensor,  # K
    codes: tl.tensor,  # the matrices, see operands.py
    codes_row: tl.tensor,  # stride of a row of codes
    group_scale: tl.tensor,
    group_zero: tl.tensor,
    row_scale: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,  # int64 [N]: rows of all experts' matrices, stacked
    is_column: tl.tensor,  # [N]
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # whether K is a multiple of BLOCK_K: then nothing is masked along it
) -> tl.tensor:
    """float32 [M, N]."""
    codes += row * codes_row
    group = row * tl.cdiv(depth, GROUP)
    if FORMAT == "int4":
        scales, zeros = group_scale + group, group_zero + group
        acc = _int4(x, is_row, depth, codes, scales, zeros, is_column, IS_WHOLE)
    elif FORMAT == "tcq2":
        acc = _tcq2(x, is_row, depth, codes, group_scale + group, table, is_column, IS_WHOLE)
    else:
        acc = _plain(x, is_row, depth, codes, is_column, BLOCK_K, IS_WHOLE)
    if row_scale is not None:
        acc *= tl.load(row_scale + row, mask=is_column, other=0.0)[None, :]
    return acc


@triton.jit
def _plain(
    x: tl.tensor,
    is_row: tl.tensor,
    depth: tl.tensor,
    weight: tl.tensor,  # [N] pointers to rows, of x's dtype or int8
    is_column: tl.tensor,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,
) -> tl.tensor:
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([x.shape[0], weight.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        is_k = (at < depth) | IS_WHOLE
        is_x, is_w = is_row[:, None] & is_k[None, :], is_k[:, None] & is_column[None, :]
        a = tl.load(x[:, None] + at[None, :], mask=is_x, other=0.0)
        w = tl.load(weight[None, :] + at[:, None], mask=is_w, other=0)
        acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _int4(
    x: tl.tensor,
    is_row: tl.tensor,
    depth: tl.tensor,
    codes: tl.tensor,  # [N] pointers to rows of K/2 bytes, the even weight in the low nibble
    scales: tl.tensor,  # [N] pointers to rows of K/128
    zeros: tl.tensor,
    is_column: tl.tensor,
    IS_WHOLE: tl.constexpr,
) -> tl.tensor:
    """sum_g (scale_g (x_g . (q_g - 8)) + zero_g sum(x_g))."""
    i, k = tl.arange(0, GROUP // 2), tl.arange(0, GROUP)
    acc = tl.zeros([x.shape[0], codes.shape[0]], tl.float32)
    for group in range(0, tl.cdiv(depth, GROUP)):
        byte, at = i + group * (GROUP // 2), k + group * GROUP
        is_x = is_row[:, None] & ((at < depth) | IS_WHOLE)[None, :]
        is_w = is_column[None, :] & ((byte < depth // 2) | IS_WHOLE)[:, None]
        a = tl.load(x[:, None] + at[None, :], mask=is_x, other=0.0)  # [M, 128]
        q = tl.load(codes[None, :] + byte[:, None], mask=is_w, other=0)  # [64, N]
        even, odd = tl.split(tl.reshape(a, [x.shape[0], GROUP // 2, 2]))
        low, high = (q & 15).to(tl.int8) - 8, (q >> 4).to(tl.int8) - 8
        part = tl.dot(even, low.to(a.dtype), input_precision="ieee")
        part = tl.dot(odd, high.to(a.dtype), part, input_precision="ieee")
        total = tl.sum(a.to(tl.float32), axis=1)
        scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group, mask=is_column, other=0.0).to(tl.float32)
        acc += part * scale[None, :] + total[:, None] * zero[None, :]
    return acc


@triton.jit
def _tcq2(
    x: tl.tensor,
    is_row: tl.tensor,
    depth: tl.tensor,
    codes: tl.tensor,  # [N] pointers to rows of K/4 bytes, the first weight in the high bits
    scales: tl.tensor,  # [N] pointers to rows of K/128, uint8
    table: tl.tensor,  # int8 [256]
    is_column: tl.tensor,
    IS_WHOLE: tl.constexpr,
) -> tl.tensor:
    """sum_g (local_g (x_g . table[state_g])); the row's scale is the caller's."""
    i, k = tl.arange(0, GROUP // 4), tl.arange(0, GROUP)
    num_groups = tl.cdiv(depth, GROUP)
    acc = tl.zeros([x.shape[0], codes.shape[0]], tl.float32)
    is_w = is_column[None, :] & ((i < depth // 4) | IS_WHOLE)[:, None]
    this, last = tcq2_bytes(codes[None, :], i[:, None], is_w)  # [32, N]
    for group in range(0, num_groups):
        window = tcq2_window(this, last)
        # The next group's bytes are on their way while this one's are decoded. The compiler does
        # not arrange that, as it does for the other formats: look-ups hang on these loads.
        byte = i + tl.minimum(group + 1, num_groups - 1) * (GROUP // 4)
        is_w = is_column[None, :] & ((byte < depth // 4) | IS_WHOLE)[:, None]
        this, last = tcq2_bytes(codes[None, :], byte[:, None], is_w)

        at = k + group * GROUP
        is_x = is_row[:, None] & ((at < depth) | IS_WHOLE)[None, :]
        a = tl.load(x[:, None] + at[None, :], mask=is_x, other=0.0)  # [M, 128]
        even, odd = tl.split(tl.reshape(a, [x.shape[0], GROUP // 4, 2, 2]))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        w0 = tl.load(table + (window >> 6 & 255)).to(a.dtype)
        w1 = tl.load(table + (window >> 4 & 255)).to(a.dtype)
        w2 = tl.load(table + (window >> 2 & 255)).to(a.dtype)
        w3 = tl.load(table + (window & 255)).to(a.dtype)
        part = tl.dot(a0, w0, input_precision="ieee")
        part = tl.dot(a1, w1, part, input_precision="ieee")
        part = tl.dot(a2, w2, part, input_precision="ieee")
        part = tl.dot(a3, w3, part, input_precision="ieee")
        scale = tl.load(scales + group, mask=is_column, other=0).to(tl.float32)
        acc += part * scale[None, :]
    return acc


@triton.jit
def tcq2_bytes(codes: tl.tensor, byte: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """A byte of a row and the one before it; a zero stands before the first."""
    this = tl.load(codes + byte, mask=mask, other=0)
    last = tl.load(codes + byte - 1, mask=mask & (byte > 0), other=0)
    return this, last


@triton.jit
def tcq2_window(this: tl.tensor, last: tl.tensor) -> tl.tensor:
    """int32: sixteen bits that hold the states of a byte's four weights.

    Weight j has the eight bits that end with its own two: (window >> (6 - 2j)) & 255.
    """
    return (last.to(tl.int32) << 8) | this.to(tl.int32)
