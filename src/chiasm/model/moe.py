"""The routed half of a MoE layer: gate -> dispatch -> combine, with the experts behind a protocol.

The experts may be anywhere: in a pool across the network, in this process, or in a training graph.
Whoever computes them, a token's result is the same sum in the same order: partials per shard in
float32 over ascending experts, added in ascending shard order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from chiasm.kernels.gate import topk_gate
from chiasm.model.config import TextConfig
from chiasm.model.linear import Linear
from chiasm.types import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Tokens of one modality on their way to one layer's experts.

    hidden: [T, H], model dtype. expert_ids: int32 [T, K] within the bank. expert_weights: float32
    [T, K], rounded to the model dtype as the reference rounds them.
    """

    modality: Modality
    layer: int
    hidden: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One shard's answer: rows int32 [N] of the dispatch, ascending, and values float32 [N, H]."""

    shard: int
    rows: torch.Tensor
    values: torch.Tensor


class PendingPartials(Protocol):
    """A dispatch under way."""

    def result(self) -> Sequence[Partial]:
        """Waits, within the caller's bounds, and returns every shard's partial."""
        ...


class Experts(Protocol):
    """Whatever computes routed experts."""

    def begin(self, dispatch: Dispatch) -> PendingPartials:
        """Sends a dispatch off without waiting for it."""
        ...


def combine(partials: Sequence[Partial], like: torch.Tensor) -> torch.Tensor:
    """Adds partials in ascending shard order, in float32; returns [T, H] in `like`'s dtype."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for partial in sorted(partials, key=lambda p: p.shard):
        total.index_add_(0, partial.rows.to(like.device).long(), partial.values.to(like.device))
    return total.to(like.dtype)


class Gate(nn.Module):
    """The two banks' gates. Parameters are float32 whatever the model's dtype.

    weight, weight_1: [H, E] of the text and the vision bank.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        shape = (config.hidden_size, config.num_experts)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.weight_1 = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def bank(self, modality: Modality) -> torch.Tensor:
        return self.weight if modality is Modality.TEXT else self.weight_1


class MoeStatics(nn.Module):
    """e_score_correction_bias float32 [2, E]: row 0 text, row 1 vision."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(2, config.num_experts, dtype=torch.float32), requires_grad=False
        )

    def bank(self, modality: Modality) -> torch.Tensor:
        return self.e_score_correction_bias[0 if modality is Modality.TEXT else 1]


class MoeBlock(nn.Module):
    """Gate, shared experts and combine of one layer; the routed experts are passed to forward."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.top_k, self.norm_min = layer, config.moe_k, config.norm_min
        self.gate = Gate(config)
        self.moe_statics = MoeStatics(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.shared_intermediate)
            if config.shared_intermediate
            else None
        )

    def route(self, hidden: torch.Tensor, modality: Modality) -> Dispatch:
        """Gates rows that all belong to `modality`."""
        expert_ids, weights = topk_gate(
            hidden,
            self.gate.bank(modality),
            self.moe_statics.bank(modality),
            top_k=self.top_k,
            norm_min=self.norm_min,
        )
        return Dispatch(
            modality=modality,
            layer=self.layer,
            hidden=hidden,
            expert_ids=expert_ids,
            expert_weights=weights.to(hidden.dtype).float(),
        )

    def stages(
        self, hidden: torch.Tensor, rows: dict[Modality, torch.Tensor], experts: Experts
    ) -> Generator[None, None, torch.Tensor]:
        """hidden [T, H] -> [T, H]; yields once, while the routed experts are under way.

        `rows` maps each modality present to the int64 indices of its tokens. The shared experts run
        before the yield, the answers are waited for after it.
        """
        sent = [(r, self.route(hidden[r], modality)) for modality, r in rows.items()]
        pending = [(r, dispatch, experts.begin(dispatch)) for r, dispatch in sent]
        shared = self.shared_experts(hidden) if self.shared_experts is not None else 0
        yield
        routed = torch.zeros_like(hidden)
        for r, dispatch, answer in pending:
            routed.index_copy_(0, r, combine(answer.result(), dispatch.hidden))
        return routed + shared


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
