"""The gate for GPUs: one program takes a few tokens from their hidden states to their experts.

The height of a tile is fixed and so is the order in which the hidden dimension is summed: what a
token gets does not depend on the batch it stands in.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def topk_gate_kernel(
    ids: tl.tensor,  # int32 [T, K]
    weights: tl.tensor,  # float32 [T, K]
    hidden: tl.tensor,  # [T, H]
    gate: tl.tensor,  # float32 [H, E]
    bias: tl.tensor,  # float32 [E]
    num_tokens: tl.tensor,
    depth: tl.tensor,  # H
    hidden_row: tl.tensor,  # stride; the last dimension's is 1
    norm_min: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h, e, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_token, is_expert = token < num_tokens, e < NUM_EXPERTS

    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    x_row = hidden + token.to(tl.int64) * hidden_row
    for start in range(0, depth, BLOCK_H):
        is_h = start + h < depth
        is_x, is_w = is_token[:, None] & is_h[None, :], is_h[:, None] & is_expert[None, :]
        x = tl.load(x_row[:, None] + (start + h)[None, :], mask=is_x, other=0.0)
        at = gate + (start + h)[:, None] * NUM_EXPERTS + e[None, :]
        w = tl.load(at, mask=is_w, other=0.0)
        logits = tl.dot(x.to(tl.float32), w, logits, input_precision="ieee")

    logits = tl.where(is_expert[None, :], logits, float("-inf"))
    probs = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    # NaN ranks first, as in torch.topk; columns past the last expert are never chosen.
    key = probs + tl.load(bias + e, mask=is_expert, other=0.0)[None, :]
    key = tl.where(key != key, float("inf"), key)  # noqa: PLR0124
    key = tl.where(is_expert[None, :], key, float("-inf"))

    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    found = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i in range(TOP_K):
        best = tl.argmax(key, axis=1, tie_break_left=True)
        is_best = e[None, :] == best[:, None]
        value = tl.sum(tl.where(is_best, probs, 0.0), axis=1)
        chosen = tl.where(k[None, :] == i, best[:, None], chosen)
        found = tl.where(k[None, :] == i, value[:, None], found)
        key = tl.where(is_best, float("-inf"), key)
    found = found / tl.maximum(tl.sum(found, axis=1), norm_min)[:, None]

    place = token.to(tl.int64)[:, None] * TOP_K + k[None, :]
    is_place = is_token[:, None] & (k < TOP_K)[None, :]
    tl.store(ids + place, chosen, mask=is_place)
    tl.store(weights + place, found, mask=is_place)
