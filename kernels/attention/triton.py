"""Paged attention for GPUs: one program works on one tile of query rows and one kv head.

A tile's rows are a few consecutive tokens of a segment times the query heads of one group, so that
the group shares every key and value it loads. Keys are visited in blocks and blocks in splits; all
of these are cut at fixed positions of the sequence. Within a split the softmax is online (Milakov
and Gimelshein 2018, arXiv:1805.02867); splits are folded together from the first to the last,
either here or, when they went to programs of their own, by `combine_kernel`, with the same
rounding. What a token gets hence depends on its sequence alone: not on the batch, the chunk, or how
the work was spread. Softmax and sums are float32; weights are cast to the values' dtype for the
product with them.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Of the parts of one array each begins wherever the one before it ends: a kernel compiled for how
# that is aligned would be compiled again in the midst of serving.
@triton.jit(do_not_specialize=["work", "pages"])
def paged_attention_kernel(
    out: tl.tensor,  # [T, heads, d]
    partial: tl.tensor,  # float32 [rows, kv_heads, d]: weighted values of one split
    partial_max: tl.tensor,  # float32 [rows, kv_heads]: largest score, in powers of two
    partial_sum: tl.tensor,  # float32 [rows, kv_heads]: sum of weights
    query: tl.tensor,  # [T, heads, d]
    keys: tl.tensor,  # [slots, kv_heads, d]
    values: tl.tensor,  # [slots, kv_heads, d]
    work: tl.tensor,  # int32 [programs, 7], see metadata.py
    pages: tl.tensor,  # int32: page of the cache of each page of a segment's tokens
    scale: tl.tensor,  # d^-0.5 log2(e)
    out_row: tl.tensor,  # strides; the last dimension's is 1
    query_row: tl.tensor,
    query_head: tl.tensor,
    slot_stride: tl.tensor,
    slot_head: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    item = work + tl.program_id(0).to(tl.int64) * 7
    kv_head = tl.program_id(1)
    first_row, first_position = tl.load(item).to(tl.int64), tl.load(item + 1)
    num_tokens, first_page = tl.load(item + 2), tl.load(item + 3)
    first_split, num_splits = tl.load(item + 4), tl.load(item + 5)
    partial_row = tl.load(item + 6)

    # The tile's queries [M, D]. A token stands in the row that its position gives it: a matrix
    # product may round differently from row to row.
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    num_before = first_position % (BLOCK_M // GROUP)
    token, head = m // GROUP - num_before, kv_head * GROUP + m % GROUP
    is_row, is_dim = (token >= 0) & (token < num_tokens), d < HEAD_DIM
    is_out = is_row[:, None] & is_dim[None, :]
    place = (first_row + token) * query_row + head * query_head
    q = tl.load(query + place[:, None] + d[None, :], mask=is_out, other=0.0)
    position = first_position + token
    stop = first_position + num_tokens

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_sum = tl.zeros([BLOCK_M], tl.float32)
    for split in range(first_split, first_split + num_splits):
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc_sum = tl.zeros([BLOCK_M], tl.float32)
        for block in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, stop), BLOCK_N):
            # Keys [D, N] and values [N, D] of the block; slots past the segment hold anything.
            key = block + n
            is_key = key < stop
            page = tl.load(pages + first_page + key // PAGE, mask=is_key, other=0)
            slot = page.to(tl.int64) * PAGE + key % PAGE
            at = slot * slot_stride + kv_head * slot_head
            is_k, is_v = is_key[None, :] & is_dim[:, None], is_key[:, None] & is_dim[None, :]
            k = tl.load(keys + at[None, :] + d[:, None], mask=is_k, other=0.0)
            v = tl.load(values + at[:, None] + d[None, :], mask=is_v, other=0.0)
            # Scores [M, N] of visible keys, then one step of the online softmax.
            s = tl.dot(q, k, input_precision="ieee") * scale
            s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
            acc_max, base, kept, _ = _rebase(acc_max, tl.max(s, axis=1))
            p = tl.exp2(s - base[:, None])
            acc_sum = acc_sum * kept + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        total_max, _, kept, added = _rebase(total_max, acc_max)
        total_sum = total_sum * kept + acc_sum * added
        total = total * kept[:, None] + acc * added[:, None]

    if partial_row < 0:
        result = total / total_sum[:, None]
        place = (first_row + token) * out_row + head * HEAD_DIM
        tl.store(out + place[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=is_out)
    else:
        place = (partial_row + m - num_before * GROUP).to(tl.int64) * tl.num_programs(1) + kv_head
        tl.store(partial + place[:, None] * HEAD_DIM + d[None, :], total, mask=is_out)
        tl.store(partial_max + place, total_max, mask=is_row)
        tl.store(partial_sum + place, total_sum, mask=is_row)


@triton.jit(do_not_specialize=["spread"])
def combine_kernel(
    out: tl.tensor,  # [T, heads, d]
    partial: tl.tensor,  # as above
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    spread: tl.tensor,  # int32 [programs, 4], see metadata.py
    out_row: tl.tensor,
    kv_heads: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One token and query head: folds its splits from the first to the last."""
    item = spread + tl.program_id(0).to(tl.int64) * 4
    head = tl.program_id(1)
    row, first = tl.load(item).to(tl.int64), tl.load(item + 1).to(tl.int64)
    step, num_splits = tl.load(item + 2), tl.load(item + 3)
    first += head % GROUP
    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM

    total = tl.zeros([BLOCK_D], tl.float32)
    total_max = tl.full([1], float("-inf"), tl.float32)
    total_sum = tl.zeros([1], tl.float32)
    one = tl.arange(0, 1)
    for split in tl.range(0, num_splits, loop_unroll_factor=4):
        at = (first + split * step) * kv_heads + head // GROUP
        acc = tl.load(partial + at * HEAD_DIM + d, mask=is_dim, other=0.0)
        total_max, _, kept, added = _rebase(total_max, tl.load(partial_max + at + one))
        total_sum = total_sum * kept + tl.load(partial_sum + at + one) * added
        total = total * kept + acc * added
    result = out + row * out_row + head * HEAD_DIM + d
    tl.store(result, (total / total_sum).to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def _rebase(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """The maximum of two, a finite base for exponents, and what each side is scaled by.

    A side that has seen no key stands at -inf, weighs 0, and leaves the other's bits alone.
    """
    top = tl.maximum(left, right)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, base, tl.exp2(left - base), tl.exp2(right - base)
