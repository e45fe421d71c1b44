"""Routed experts on a CPU: every expert's tokens together, each matrix read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chiasm.kernels.moe.reference import ShardWeights
from chiasm.kernels.quant.cpu import Runs, grouped_linear


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.moe.reference.shard_partial."""
    local = expert_ids.long() - weights.first  # [T, K]
    mine = (local >= 0) & (local < weights.num_experts)
    rows = mine.any(dim=-1).nonzero().squeeze(-1)  # [N]
    values = torch.zeros(rows.numel(), hidden.shape[1], dtype=torch.float32)
    token, choice = mine.nonzero(as_tuple=True)
    expert = local[token, choice]
    # By expert, and within an expert by token: a token's experts come in ascending order.
    expert, order = torch.sort(expert, stable=True)
    token, choice = token[order], choice[order]
    runs = _runs(expert, token, weights.num_experts)
    gate, up = grouped_linear(weights.gate_up, hidden, runs).chunk(2, dim=-1)
    inner = F.silu(gate) * up  # [P, I]
    straight = torch.arange(len(token), dtype=torch.int32)
    out = grouped_linear(
        weights.down,
        inner,
        Runs(experts=runs.experts, begin=runs.begin, end=runs.end, index=straight),
    )
    scaled = out.float() * expert_weights[token, choice, None]
    slot = torch.searchsorted(rows, token)
    for turn in _turns(slot):
        values.index_add_(0, slot[turn], scaled[turn])
    return rows.to(torch.int32), values


def _runs(expert: torch.Tensor, token: torch.Tensor, num_experts: int) -> Runs:
    counts = torch.bincount(expert, minlength=num_experts)
    ends = counts.cumsum(0)
    experts = counts.nonzero().squeeze(-1)
    return Runs(
        experts=experts.tolist(),
        begin=(ends - counts)[experts].tolist(),
        end=ends[experts].tolist(),
        index=token.to(torch.int32),
    )


def _turns(slot: torch.Tensor) -> list[torch.Tensor]:
    """The pairs (by row of the result) cut so that each turn has a row at most once, in order.

    What is added to a row comes in ascending experts then, however many rows there are.
    """
    if not len(slot):
        return []
    order = torch.argsort(slot, stable=True)
    by_slot = slot[order]
    first = torch.searchsorted(by_slot, by_slot)  # where each row's pairs begin
    rank = torch.empty_like(slot)
    rank[order] = torch.arange(len(slot)) - first
    return [(rank == turn).nonzero().squeeze(-1) for turn in range(int(rank.max()) + 1)]
