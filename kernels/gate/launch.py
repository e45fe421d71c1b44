"""Checks, grid and launch of the Triton kernel in triton.py."""

from __future__ import annotations

import torch

from chiasm import errors
from chiasm.kernels.device import DTYPES

MAX_EXPERTS = 512
"""With more, a program's weights do not fit the shared memory of every GPU."""

TILE_TOKENS = 16
"""Tokens of one program. One value for prefill and decode: see triton.py."""

TILE_ELEMENTS = 4096
"""Of the gate's weights that a program holds at a time."""


def topk_gate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    top_k: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py; of experts with equal biased probabilities the lowest ids are chosen.

    The bias must be finite. Raises Internal when shapes, dtypes or devices do not fit together:
    nothing has run then.
    """
    _check(hidden, weight, correction_bias, top_k)
    num_tokens, depth = hidden.shape
    num_experts = weight.shape[1]
    shape = (num_tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=hidden.device)
    weights = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    if not num_tokens:
        return ids, weights
    from chiasm.kernels.gate import triton as kernels

    block_e = expert_block(num_experts)
    kernels.topk_gate_kernel[(-(-num_tokens // TILE_TOKENS),)](
        ids,
        weights,
        hidden,
        weight.contiguous(),
        correction_bias.contiguous(),
        num_tokens,
        depth,
        hidden.stride(0),
        norm_min,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        BLOCK_T=TILE_TOKENS,
        BLOCK_H=depth_block(block_e),
        BLOCK_E=block_e,
        BLOCK_K=1 << (top_k - 1).bit_length(),
        num_warps=num_warps(block_e),
        enable_fp_fusion=True,
    )
    return ids, weights


def expert_block(num_experts: int) -> int:
    """Experts as the kernel holds them: matrix products take powers of two from 16."""
    return max(16, 1 << (num_experts - 1).bit_length())


def depth_block(block_e: int) -> int:
    """Hidden dimensions of one step of the product: a power of two in 16..64."""
    return min(64, max(16, TILE_ELEMENTS // block_e))


def num_warps(block_e: int) -> int:
    """Warps of one program: a tile of logits, probabilities and keys must fit its registers."""
    return 4 if block_e <= 128 else 8


def _check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int) -> None:
    num_experts = weight.shape[1]
    if hidden.dtype not in DTYPES or not weight.dtype == bias.dtype == torch.float32:
        raise errors.Internal(f"gate of {weight.dtype} and {bias.dtype} on {hidden.dtype}")
    if not hidden.device == weight.device == bias.device:
        raise errors.Internal(f"gate over {hidden.device}, {weight.device} and {bias.device}")
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[0] or hidden.stride(1) != 1:
        raise errors.Internal(f"gate of {list(weight.shape)} on {list(hidden.shape)}")
    if bias.shape != (num_experts,) or not 1 <= top_k <= num_experts <= MAX_EXPERTS:
        raise errors.Internal(f"{top_k} of {num_experts} experts with {list(bias.shape)} biases")
