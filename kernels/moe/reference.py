"""Routed experts in plain torch; the specification of every other implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chiasm.kernels.quant.formats import ExpertMatrices


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False, kw_only=True)
class ShardWeights:
    """Weights of one layer's experts [first, first + E_s) of a bank.

    gate_up: E_s matrices [2*I, H], gate rows first. down: E_s matrices [H, I].
    """

    first: int
    gate_up: ExpertMatrices
    down: ExpertMatrices

    @property
    def num_experts(self) -> int:
        return self.gate_up.num_experts


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the shard's share of each token's experts.

    value(t) = sum over the shard's experts e chosen for t, ascending, of
    w(t, e) * down_e(silu(gate_e(x_t)) * up_e(x_t)); each expert runs in the model's dtype, to which
    low-precision weights are widened; the products with w and the sum are float32.

    Args:
        hidden: [T, H] in the model's dtype.
        expert_ids: int32 [T, K], ids within the bank; those outside the shard are ignored.
        expert_weights: float32 [T, K].

    Returns:
        rows int32 [N], ascending: tokens with an expert in this shard; values float32 [N, H].
    """
    local = expert_ids.long() - weights.first  # [T, K]
    mine = (local >= 0) & (local < weights.num_experts)
    rows = mine.any(dim=-1).nonzero().squeeze(-1)  # [N]
    slot = torch.empty(hidden.shape[0], dtype=torch.long, device=hidden.device)
    slot[rows] = torch.arange(rows.numel(), device=hidden.device)
    values = torch.zeros(rows.numel(), hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for expert in torch.unique(local[mine]).tolist():
        token, choice = (local == expert).nonzero(as_tuple=True)
        gate_up = weights.gate_up.dequantize(expert, hidden.dtype)
        gate, up = F.linear(hidden[token], gate_up).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, weights.down.dequantize(expert, hidden.dtype))
        values.index_add_(0, slot[token], out.float() * expert_weights[token, choice, None])
    return rows.to(torch.int32), values
