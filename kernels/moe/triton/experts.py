"""Grouped products of the routed experts: all experts of a call in one launch.

Pairs stand sorted by expert (permute.py). An expert's pairs are cut into tiles of BLOCK_M rows, the
last one ragged; a program finds its tile from the experts' first places alone, and works on BLOCK_N
rows of the expert's matrix. Programs of one tile follow each other, so that the rows they share are
still in the cache, and so do tiles of one expert, which share its matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chiasm.kernels.moe.triton.product import product


@triton.jit(do_not_specialize=["starts", "num_experts"])
def gate_up_kernel(
    out: tl.tensor,  # [P, I]: silu(gate) * up of the call's pairs, sorted
    hidden: tl.tensor,  # [T, H]
    order: tl.tensor,  # int32: the pair at each place
    starts: tl.tensor,  # int32 [E + 1]: first place of each of the call's experts, and the end
    codes: tl.tensor,  # [E, 2 * I, H], see operands.py
    group_scale: tl.tensor,
    group_zero: tl.tensor,
    row_scale: tl.tensor,
    table: tl.tensor,
    num_experts: tl.tensor,  # E
    width: tl.tensor,  # I
    depth: tl.tensor,  # H
    codes_row: tl.tensor,  # strides; the last dimensions' are 1
    hidden_row: tl.tensor,
    FORMAT: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    IS_WHOLE: tl.constexpr,
) -> None:
    num_columns = tl.cdiv(2 * width, BLOCK_N)
    column = (tl.program_id(0) % num_columns) * BLOCK_N
    expert, place, is_row = _tile(
        starts, tl.program_id(0) // num_columns, num_experts, BLOCK_M, BLOCK_E
    )
    pair = tl.load(order + place, mask=is_row, other=0)
    x = hidden + (pair // TOP_K).to(tl.int64) * hidden_row
    # Rows of gate and up alternate, so that a thread holds both numbers of a result.
    n = column + tl.arange(0, BLOCK_N)
    row = expert.to(tl.int64) * (2 * width) + (n % 2) * width + n // 2
    acc = product(
        x, is_row, depth, codes, codes_row, group_scale, group_zero, row_scale, table, row,
        n < 2 * width, FORMAT, BLOCK_K, IS_WHOLE,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
    value = gate * tl.sigmoid(gate) * up
    n = column // 2 + tl.arange(0, BLOCK_N // 2)
    at = (place - tl.load(starts)).to(tl.int64)[:, None] * width + n[None, :]
    is_out = is_row[:, None] & (n < width)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["starts", "num_experts"])
def down_kernel(
    out: tl.tensor,  # float32 [P, H]: weighted results of the call's pairs, sorted
    inner: tl.tensor,  # [P, I]: what gate_up_kernel left
    expert_weights: tl.tensor,  # float32 [T, K]
    order: tl.tensor,  # as above
    starts: tl.tensor,
    codes: tl.tensor,  # [E, H, I], see operands.py
    group_scale: tl.tensor,
    group_zero: tl.tensor,
    row_scale: tl.tensor,
    table: tl.tensor,
    num_experts: tl.tensor,  # E
    width: tl.tensor,  # H
    depth: tl.tensor,  # I
    codes_row: tl.tensor,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    IS_WHOLE: tl.constexpr,
) -> None:
    num_columns = tl.cdiv(width, BLOCK_N)
    column = (tl.program_id(0) % num_columns) * BLOCK_N
    expert, place, is_row = _tile(
        starts, tl.program_id(0) // num_columns, num_experts, BLOCK_M, BLOCK_E
    )
    n = column + tl.arange(0, BLOCK_N)
    row = expert.to(tl.int64) * width + n
    result = (place - tl.load(starts)).to(tl.int64)
    acc = product(
        inner + result * depth, is_row, depth, codes, codes_row, group_scale, group_zero, row_scale,
        table, row, n < width, FORMAT, BLOCK_K, IS_WHOLE,
    )  # fmt: skip
    pair = tl.load(order + place, mask=is_row, other=0)
    weight = tl.load(expert_weights + pair, mask=is_row, other=0.0)
    is_out = is_row[:, None] & (n < width)[None, :]
    tl.store(out + result[:, None] * width + n[None, :], acc * weight[:, None], mask=is_out)


@triton.jit
def _tile(
    starts: tl.tensor,
    tile: tl.tensor,
    num_experts: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """The expert of a tile, the tile's places [M], and which of them are its pairs'."""
    e = tl.arange(0, BLOCK_E)
    is_expert = e < num_experts
    start = tl.load(starts + e, mask=is_expert, other=0)
    stop = tl.load(starts + e + 1, mask=is_expert, other=0)
    num_tiles = tl.cdiv(stop - start, BLOCK_M)
    last = tl.cumsum(num_tiles, axis=0)
    expert = tl.sum((is_expert & (last <= tile)).to(tl.int32), axis=0)
    first_tile = tl.sum(tl.where(e < expert, num_tiles, 0), axis=0)
    first = tl.load(starts + expert) + (tile - first_tile) * BLOCK_M
    place = first + tl.arange(0, BLOCK_M)
    return expert, place, place < tl.load(starts + expert + 1)


@triton.jit(do_not_specialize=["starts", "num_experts"])
def combine_kernel(
    values: tl.tensor,  # float32 [N, H]
    results: tl.tensor,  # float32 [P, H]: of the call's pairs, sorted
    rows: tl.tensor,  # int32 [N]
    place: tl.tensor,  # int32 [T, K]
    starts: tl.tensor,  # int32 [E + 1], as above
    num_experts: tl.tensor,
    width: tl.tensor,  # H
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_FIRST: tl.constexpr,
) -> None:
    """One row: adds the call's results in ascending place, which is ascending expert.

    The first call of a shard starts from zero, the next from what the one before it left.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, stop = tl.load(starts), tl.load(starts + num_experts)
    token = tl.load(rows + row).to(tl.int64)
    at = tl.load(place + token * TOP_K + k, mask=k < TOP_K, other=-1)
    at = tl.where((at >= first) & (at < stop), at, stop)

    out = values + row * width + n
    total = tl.zeros([BLOCK_N], tl.float32)
    if not IS_FIRST:
        total = tl.load(out, mask=n < width, other=0.0)
    last = first - 1
    for _ in range(TOP_K):
        last = tl.min(tl.where(at > last, at, stop), axis=0)
        mine = results + (last - first).to(tl.int64) * width + n
        total += tl.load(mine, mask=n < tl.where(last < stop, width, 0), other=0.0)
    tl.store(out, total, mask=n < width)
