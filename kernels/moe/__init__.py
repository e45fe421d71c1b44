"""Routed experts of one shard: weighted partial sums over its experts.

    reference.py  plain torch; the specification of the others
    scratch.py    how many experts are computed together
    cpu.py        the same on a CPU, low-precision matrices read as they are stored
    few.py        of few rows, in one call
    operands.py   matrices of any format as the kernels take them
    permute.py    sorts the pairs of a dispatch by expert
    transform.py  decodes matrices and rotates rows before a product
    triton/       kernels for GPUs
    configs/      their tile sizes
    ahead.py      has them compiled ahead of time
    launch.py     checks, grids and launches

Tensors on a CUDA device take the kernels where triton is installed, tensors on a CPU take cpu.py.
Neither has a backward pass: what autograd must follow takes the reference, and so does, on a GPU, a
format without kernels (WINT2). docs/kernels.md says how they work and what has run.
"""

from __future__ import annotations

import torch

from chiasm.kernels.device import is_triton
from chiasm.kernels.moe import ahead, cpu, launch, reference
from chiasm.kernels.moe.reference import ShardWeights

__all__ = ["ShardWeights", "compile_ahead", "shard_partial"]


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
    spent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the shard's share of each token's experts; see reference.py for the exact statement.

    hidden [T, H] in the model's dtype. expert_ids int32 [T, K] within the bank. expert_weights
    float32 [T, K]. Returns rows int32 [N], ascending, and values float32 [N, H].

    spent: int64 [E_s] on the CPU. The nanoseconds that the products of each of the shard's experts
    take are added to it; none on a GPU, where one product is of all experts.
    """
    is_trained = torch.is_grad_enabled() and hidden.requires_grad
    if is_triton(hidden.device) and launch.is_supported(weights) and not is_trained:
        with torch.cuda.device(hidden.device):  # triton launches on the current device
            return launch.shard_partial(hidden, expert_ids, expert_weights, weights)
    if hidden.device.type == "cpu" and not is_trained:
        return cpu.shard_partial(hidden, expert_ids, expert_weights, weights, spent)
    return reference.shard_partial(hidden, expert_ids, expert_weights, weights)


def compile_ahead(
    weights: ShardWeights, *, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Has all kernels compiled that dispatches of `dtype` to a shard need; nothing on a CPU."""
    if is_triton(device) and launch.is_supported(weights):
        with torch.cuda.device(device):
            ahead.compile_ahead(weights, top_k=top_k, dtype=dtype, device=device)
