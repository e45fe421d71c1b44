"""Sorts the pairs of a dispatch by expert, on the device that holds them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

MAX_EXPERTS = 1024
BLOCK_PAIRS = 512
"""Pairs of one block, at most. A call of one block is one launch."""

BLOCK_ELEMENTS = 1 << 14
"""Pairs times experts of one block: they must fit its registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """A dispatch's pairs (token, choice) in ascending order of expert, then token, then choice.

    A pair's number is token * K + choice. Pairs with other shards' experts have no place.

    order: int32, of which the first P are used: the pair at each place.
    place: int32 [T, K]: the place of each pair, or -1.
    rows: int32 [N]: tokens with an expert of the shard, ascending.
    starts: int32 [E_s + 1]: the first place of each expert, and P.
    counts: the pairs of each expert, on the host.
    """

    order: torch.Tensor
    place: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    counts: tuple[int, ...]


def permute(expert_ids: torch.Tensor, *, first_expert: int, num_experts: int) -> Permutation:
    """expert_ids: int32 [T, K] with T > 0, contiguous.

    Waits for the device once, for the counts: how many rows a shard answers with is a shape.
    """
    from chiasm.kernels.moe.triton import permute as kernels

    num_tokens, top_k = expert_ids.shape
    blocks = block_sizes(top_k, num_experts)
    num_blocks = -(-num_tokens // blocks["BLOCK_T"])
    shapes = [(num_tokens * top_k,), (num_tokens, top_k), (num_tokens,), (num_experts + 2,)]
    order, place, rows, summary = (expert_ids.new_empty(shape) for shape in shapes)
    counts = expert_ids.new_empty(num_blocks, num_experts + 1) if num_blocks > 1 else summary
    constants = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, **blocks, "num_warps": 8}
    constants["enable_fp_fusion"] = True
    if num_blocks > 1:
        kernels.count_kernel[(num_blocks,)](
            counts, expert_ids, first_expert, num_tokens, **constants
        )
    kernels.scatter_kernel[(num_blocks,)](
        order,
        place,
        rows,
        summary,
        counts,
        expert_ids,
        first_expert,
        num_tokens,
        num_blocks,
        IS_SINGLE=num_blocks == 1,
        **constants,
    )
    *starts, num_rows = summary.tolist()
    return Permutation(
        order=order,
        place=place,
        rows=rows[:num_rows],
        starts=summary[:-1],
        counts=tuple(stop - start for start, stop in itertools.pairwise(starts)),
    )


def block_sizes(top_k: int, num_experts: int) -> dict[str, int]:
    """Constants of the kernels: a block's tokens, and powers of two that hold choices, experts."""
    block_k, block_e = (1 << (n - 1).bit_length() for n in (top_k, num_experts))
    pairs = max(block_k, min(BLOCK_PAIRS, BLOCK_ELEMENTS // block_e))
    return {"BLOCK_T": pairs // block_k, "BLOCK_K": block_k, "BLOCK_E": block_e}
