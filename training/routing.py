"""Routed experts for training: all banks of the model in one process, differentiable.

The tokens of a dispatch are sorted by expert and laid out in blocks of equal size, one for each
expert and more for those that have the most, so that one batched product does a whole bank's work,
however unevenly it is loaded: no token is dropped. Sizes and numbers of blocks are rounded up,
because a product of a new shape costs more than one that is a little larger (training.precision).
The products may be in bfloat16, and what is added up of a token's experts is rounded to it then;
parameters and their gradients are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from chiasm.model.config import TextConfig
from chiasm.model.moe import Dispatch, Partial
from chiasm.training.precision import round_up
from chiasm.types import TOKEN_TEXT, Modality

_ROWS = 16
"""Blocks have a multiple of so many rows."""
_MORE_BLOCKS = 8
"""Where experts need several, the number of further blocks is a multiple of this."""
_UNEVEN = 2
"""Rows of a block over the mean of an expert's tokens, at most, but for rounding up."""
Usage = dict[tuple[Modality, int], torch.Tensor]
"""Choices per expert, int64 [E], by modality and layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """What one gate did in one forward pass.

    hidden: [T, H], what the gate saw, attached to the graph. expert_ids: int64 [T, K].
    """

    layer: int
    modality: Modality
    hidden: torch.Tensor
    expert_ids: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Where each choice of each token stands among B >= E blocks of C rows.

    rows: C. owner: int64 [B], the block's expert; the first E are 0..E-1. token: int64 [B * C], the
    row's token; T in padding. place: int64 [T, K], the row of each choice.
    """

    rows: int
    owner: torch.Tensor
    token: torch.Tensor
    place: torch.Tensor
    num_experts: int

    @classmethod
    def lay_out(cls, expert_ids: torch.Tensor, num_experts: int) -> Blocks:
        """expert_ids int64 [T, K] -> the blocks; an expert's tokens ascend."""
        num_tokens, top_k = expert_ids.shape
        flat = expert_ids.flatten()
        order = torch.argsort(flat, stable=True)  # [T * K]
        counts = torch.bincount(flat, minlength=num_experts)
        even = -(-max(len(flat), 1) // num_experts)
        rows = round_up(min(max(int(counts.max()), 1), _UNEVEN * even), _ROWS)
        owner, first = _deal((-(-counts // rows)).clamp(min=1), num_experts)
        expert = flat[order]
        rank = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[expert]  # within its expert
        further = (first[expert] + rank // rows - 1) * rows
        row = torch.where(rank < rows, expert * rows, further) + rank % rows
        token = torch.full((len(owner) * rows,), num_tokens)
        token[row] = order // top_k
        place = torch.empty_like(order)
        place[order] = row
        place = place.view(num_tokens, top_k)
        return cls(rows=rows, owner=owner, token=token, place=place, num_experts=num_experts)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [T, H] -> [B, C, H], zero in padding."""
        padded = torch.cat((tokens, tokens.new_zeros(1, tokens.shape[1])))
        return padded.index_select(0, self.token).view(-1, self.rows, tokens.shape[1])

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """rows [B, C, H] -> float32 [T, H], each token's (weighted) sum over its choices.

        It is rounded to the dtype of `rows`.
        """
        weights = None if weights is None else weights.to(rows.dtype)
        flat = rows.flatten(0, 1)
        return F.embedding_bag(self.place, flat, mode="sum", per_sample_weights=weights).float()

    def matrices(self, experts: torch.Tensor) -> torch.Tensor:
        """[E, ...] -> [B, ...], those of the blocks' owners."""
        is_one_each = len(self.owner) == self.num_experts
        return experts.contiguous() if is_one_each else experts.index_select(0, self.owner)

    def per_expert(self, by_block: torch.Tensor) -> torch.Tensor:
        """Adds the blocks of each expert: [B, ...] -> float32 [E, ...]."""
        first, more = by_block.float().tensor_split([self.num_experts])
        return first.index_add_(0, self.owner[self.num_experts :], more) if len(more) else first


def _deal(blocks: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks int64 [E], how many each expert needs -> their owners, int64 [B], and where each
    expert's second block stands among them."""
    more, experts = blocks - 1, torch.arange(num_experts)
    first = num_experts + more.cumsum(0) - more
    owner = torch.cat((experts, experts.repeat_interleave(more)))
    spare = num_experts + round_up(len(owner) - num_experts, _MORE_BLOCKS) - len(owner)
    return torch.cat((owner, owner.new_zeros(spare))), first


def grouped_swiglu(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y_t = sum_k w_tk down_e(silu(gate_e(x_t)) * up_e(x_t)), e = expert k of token t.

    hidden [T, H], weights float32 [T, K], gate_up [E, 2I, H], down [E, H, I] -> float32 [T, H].
    dtype: of the products. Differentiable in the four tensors.
    """
    out: torch.Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]  # not annotated
        hidden, weights, gate_up, down, blocks, dtype
    )
    return out


class _GroupedSwiGLU(torch.autograd.Function):
    """Written by hand because the gradient of autograd's version would scatter every choice of
    every token, where whole blocks can be moved. Gate and up are products of their own: halves of
    one would not be contiguous, and what follows several times slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        blocks: Blocks,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x = blocks.spread(hidden.to(dtype))
        to_gate, to_up = (blocks.matrices(w.to(dtype)) for w in gate_up.chunk(2, dim=1))
        to_out = blocks.matrices(down.to(dtype))
        gate, up = torch.bmm(x, to_gate.mT), torch.bmm(x, to_up.mT)  # [B, C, I]
        active = F.silu(gate)
        inner = active * up
        y = torch.bmm(inner, to_out.mT)  # [B, C, H]
        ctx.save_for_backward(x, gate, up, active, inner, to_gate, to_up, to_out, weights)
        ctx.blocks = blocks
        return blocks.gather(y, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gate, up, active, inner, to_gate, to_up, to_out, weights = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        d_y = blocks.spread(grads[0].to(x.dtype))  # of unweighted outputs, as is what follows
        d_inner = torch.bmm(d_y, to_out)
        d_weights = (d_inner * inner).sum(-1).float().flatten()[blocks.place]
        scale = weights.new_zeros(len(blocks.token))
        scale[blocks.place.flatten()] = weights.flatten()
        scale = scale.view(len(blocks.owner), -1, 1).to(x.dtype)
        d_down = blocks.per_expert(torch.bmm(d_y.mT, inner * scale))
        d_inner = d_inner * scale
        d_up = d_inner * active
        d_gate = torch.ops.aten.silu_backward(d_inner * up, gate)
        d_x = torch.bmm(d_gate, to_gate).baddbmm_(d_up, to_up)
        d_gate_up = torch.cat(
            [blocks.per_expert(torch.bmm(d.mT, x)) for d in (d_gate, d_up)], dim=1
        )
        return blocks.gather(d_x).to(grads[0].dtype), d_weights, d_gate_up, d_down, None, None


class ExpertWeights(nn.Module):
    """One layer's experts of one bank: gate_up [E, 2I, H], gate rows first, and down [E, H, I]."""

    def __init__(self, num_experts: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))


@dataclass(frozen=True, slots=True)
class Computed:
    """A dispatch that was answered at once; a model.moe.PendingPartials."""

    partial: Partial

    def result(self) -> Sequence[Partial]:
        return (self.partial,)


class TrainingExperts(nn.Module):
    """All experts of the given banks."""

    def __init__(
        self, config: TextConfig, modalities: Sequence[Modality], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        """Of the products; bfloat16 is about twice as fast on a CPU that has it."""
        self.banks = nn.ModuleDict(
            {
                f"{modality}_{layer}": ExpertWeights(
                    config.num_experts, config.expert_intermediate(modality), config.hidden_size
                )
                for modality in modalities
                for layer in config.moe_layers
            }
        )

    def compute(self, dispatch: Dispatch, expert_ids: torch.Tensor) -> torch.Tensor:
        """float32 [T, H] of a dispatch with its expert_ids as int64; it keeps its graph."""
        bank = self.banks[f"{dispatch.modality}_{dispatch.layer}"]
        assert isinstance(bank, ExpertWeights)
        blocks = Blocks.lay_out(expert_ids, len(bank.gate_up))
        return grouped_swiglu(
            dispatch.hidden, dispatch.expert_weights, bank.gate_up, bank.down, blocks, self.dtype
        )


class Recording:
    """The experts during one pass; a model.moe.Experts that keeps a record of every dispatch."""

    def __init__(self, experts: TrainingExperts) -> None:
        self._experts = experts
        self.records: list[RoutingRecord] = []
        """In the order of the layers."""

    def begin(self, dispatch: Dispatch) -> Computed:
        """Computes the dispatch at once."""
        expert_ids = dispatch.expert_ids.long()
        self.records.append(
            RoutingRecord(
                layer=dispatch.layer,
                modality=dispatch.modality,
                hidden=dispatch.hidden,
                expert_ids=expert_ids,
            )
        )
        values = self._experts.compute(dispatch, expert_ids)
        rows = torch.arange(len(expert_ids), dtype=torch.int32)
        return Computed(Partial(shard=0, rows=rows, values=values))


def choices_by_gate(records: Sequence[RoutingRecord], num_experts: int) -> Usage:
    """Choices per expert, int64 [E], by gate and layer, of one pass."""
    found: Usage = {}
    for record in records:
        found[record.modality, record.layer] = _count(record.expert_ids, num_experts)
    return found


def choices_by_modality(
    records: Sequence[RoutingRecord], token_types: torch.Tensor, num_experts: int
) -> Usage:
    """The same, but by what the tokens are.

    In a shared pool both modalities' tokens stand in one record.
    """
    masks = {Modality.TEXT: token_types == TOKEN_TEXT, Modality.VISION: token_types != TOKEN_TEXT}
    found: Usage = {}
    for record in records:
        if len(record.expert_ids) == len(token_types):  # all tokens: look which are whose
            for modality, mask in masks.items():
                if mask.any():
                    found[modality, record.layer] = _count(record.expert_ids[mask], num_experts)
        else:
            found[record.modality, record.layer] = _count(record.expert_ids, num_experts)
    return found


def add_usage(total: Usage, more: Usage) -> None:
    """Adds `more` to `total` in place."""
    for key, counts in more.items():
        total[key] = total[key] + counts if key in total else counts


def _count(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(expert_ids.flatten(), minlength=num_experts)
