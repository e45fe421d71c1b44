"""A counting sort of (token, choice) pairs by expert: stable, and without atomics.

Tokens are cut into blocks. `count_kernel` counts each block's pairs per expert; `scatter_kernel`
adds up what stands before a block and puts its pairs in their places. A call of one block needs the
second alone. A pair's number is token * K + choice, as in the flattened [T, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS_AT_A_TIME = tl.constexpr(16)


@triton.jit(do_not_specialize=["first_expert", "num_tokens"])
def count_kernel(
    counts: tl.tensor,  # int32 [blocks, E_s + 1]: pairs per expert; last, tokens with any
    expert_ids: tl.tensor,  # int32 [T, K]
    first_expert: tl.tensor,
    num_tokens: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    _, local = _block(
        expert_ids, first_expert, num_tokens, block, NUM_EXPERTS, TOP_K, BLOCK_T, BLOCK_K
    )
    e = tl.arange(0, BLOCK_E)
    is_chosen = (local[None, :] == e[:, None]).to(tl.int32)  # [E, pairs]
    row = counts + block * (NUM_EXPERTS + 1)
    tl.store(row + e, tl.sum(is_chosen, axis=1), mask=e < NUM_EXPERTS)
    tl.store(row + NUM_EXPERTS, tl.sum(_has_expert(local, BLOCK_T, BLOCK_K), axis=0))


@triton.jit(do_not_specialize=["first_expert", "num_tokens", "num_blocks"])
def scatter_kernel(
    order: tl.tensor,  # int32 [T * K]: the pair at each place; ascending expert, then pair
    place: tl.tensor,  # int32 [T, K]: the place of each pair, -1 for other shards' experts
    rows: tl.tensor,  # int32 [T]: tokens with an expert of the shard, ascending
    summary: tl.tensor,  # int32 [E_s + 2]: first place of each expert, number of pairs, of rows
    counts: tl.tensor,  # as above; not read when there is one block
    expert_ids: tl.tensor,  # int32 [T, K]
    first_expert: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    IS_SINGLE: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    pair, local = _block(
        expert_ids, first_expert, num_tokens, block, NUM_EXPERTS, TOP_K, BLOCK_T, BLOCK_K
    )
    e = tl.arange(0, BLOCK_E)
    is_chosen = (local[None, :] == e[:, None]).to(tl.int32)  # [E, pairs]
    has_expert = _has_expert(local, BLOCK_T, BLOCK_K)

    # Pairs per expert, and tokens: of all blocks, and of those before this one.
    if IS_SINGLE:
        before, total = tl.zeros([BLOCK_E], tl.int32), tl.sum(is_chosen, axis=1)
        rows_before, num_rows = 0, tl.sum(has_expert, axis=0)
    else:
        before, total = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
        rows_before, num_rows = 0, 0
        for start in range(0, num_blocks, BLOCKS_AT_A_TIME):
            b = start + tl.arange(0, BLOCKS_AT_A_TIME)
            at, is_b = counts + b * (NUM_EXPERTS + 1), b < num_blocks
            is_count = is_b[:, None] & (e < NUM_EXPERTS)[None, :]
            count = tl.load(at[:, None] + e[None, :], mask=is_count, other=0)
            total += tl.sum(count, axis=0)
            before += tl.sum(tl.where((b < block)[:, None], count, 0), axis=0)
            count = tl.load(at + NUM_EXPERTS, mask=is_b, other=0)
            num_rows += tl.sum(count, axis=0)
            rows_before += tl.sum(tl.where(b < block, count, 0), axis=0)

    start_of = tl.cumsum(total, axis=0) - total
    rank = tl.cumsum(is_chosen, axis=1) - is_chosen + (start_of + before)[:, None]
    found = tl.sum(is_chosen * rank, axis=0)  # [pairs]
    is_mine = local >= 0
    tl.store(order + found, pair, mask=is_mine)
    is_pair = pair >= 0
    tl.store(place + pair, tl.where(is_mine, found, -1), mask=is_pair)

    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row = rows_before + tl.cumsum(has_expert, axis=0) - has_expert
    tl.store(rows + row, token, mask=has_expert > 0)
    if block == 0:
        tl.store(summary + e, start_of, mask=e < NUM_EXPERTS)
        tl.store(summary + NUM_EXPERTS, tl.sum(total, axis=0))
        tl.store(summary + NUM_EXPERTS + 1, num_rows)


@triton.jit
def _block(
    expert_ids: tl.tensor,
    first_expert: tl.tensor,
    num_tokens: tl.tensor,
    block: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A block's pairs and their experts within the shard; -1 where there is none."""
    p = tl.arange(0, BLOCK_T * BLOCK_K)
    token, choice = block * BLOCK_T + p // BLOCK_K, p % BLOCK_K
    is_pair = (token < num_tokens) & (choice < TOP_K)
    pair = tl.where(is_pair, token * TOP_K + choice, -1)
    local = tl.load(expert_ids + pair, mask=is_pair, other=-1) - first_expert
    is_mine = is_pair & (local >= 0) & (local < NUM_EXPERTS)
    return pair, tl.where(is_mine, local, -1)


@triton.jit
def _has_expert(local: tl.tensor, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """int32 [BLOCK_T]: 1 for tokens with an expert of the shard."""
    return tl.max((tl.reshape(local, [BLOCK_T, BLOCK_K]) >= 0).to(tl.int32), axis=1)
