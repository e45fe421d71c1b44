"""The gate in plain torch; the specification of every other implementation."""

from __future__ import annotations

import torch


def topk_gate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    top_k: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses `top_k` experts of one bank for each token.

    p = softmax(hidden @ weight) in float32; the experts are the top k of p + correction_bias, their
    weights are p (without the bias) divided by max(sum of the chosen p, norm_min).
    Source: ERNIE `ernie/moe/topk_gate.py`, transformers `Ernie4_5_VLMoeMoeTopKRouter`.

    Args:
        hidden: [T, H], any float dtype; upcast to float32.
        weight: [H, E] float32.
        correction_bias: [E] float32; steers the selection only.

    Returns:
        expert ids int32 [T, K], highest biased probability first, and weights float32 [T, K].
    """
    probs = torch.softmax(hidden.float() @ weight.float(), dim=-1)  # [T, E]
    chosen = torch.topk(probs + correction_bias, top_k, dim=-1).indices  # [T, K]
    weights = probs.gather(-1, chosen)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return chosen.to(torch.int32), weights
