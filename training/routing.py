"""Routed experts for training: all banks of the model in one process, differentiable.

The tokens of a dispatch are sorted by expert and cut into blocks of equal size, so that one batched
product does a whole bank's work, however unevenly it is loaded: no token is dropped, and an expert
wastes less than one block. The products may be in bfloat16; parameters, their gradients and the
weighted sum are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chiasm.model.config import TextConfig
from chiasm.model.moe import Dispatch, Partial
from chiasm.types import TOKEN_TEXT, Modality

BLOCK_ROWS = 48
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
    """Where each choice of each token stands among B blocks of C rows.

    owner: int64 [B], the block's expert. token: int64 [B * C], the row's token; T in padding.
    place: int64 [T, K], the row of each choice.
    """

    owner: torch.Tensor
    token: torch.Tensor
    place: torch.Tensor

    @classmethod
    def lay_out(cls, expert_ids: torch.Tensor, num_experts: int, rows: int = BLOCK_ROWS) -> Blocks:
        """expert_ids int64 [T, K] -> the blocks, by ascending expert and token."""
        num_tokens, top_k = expert_ids.shape
        flat = expert_ids.flatten()
        order = torch.argsort(flat, stable=True)  # [T * K]
        counts = torch.bincount(flat, minlength=num_experts)
        blocks = (counts + rows - 1) // rows
        # How far an expert's rows move when every expert before it is filled up to whole blocks.
        shift = (blocks.cumsum(0) - blocks) * rows - (counts.cumsum(0) - counts)
        row = torch.arange(len(flat)) + shift[flat[order]]
        token = torch.full((int(blocks.sum()) * rows,), num_tokens)
        token[row] = order // top_k
        place = torch.empty_like(order)
        place[order] = row
        owner = torch.repeat_interleave(torch.arange(num_experts), blocks)
        return cls(owner=owner, token=token, place=place.view(num_tokens, top_k))

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [T, H] -> [B, C, H], zero in padding."""
        padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        return padded.index_select(0, self.token).view(len(self.owner), -1, rows.shape[1])

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """rows [B, C, H] -> float32 [T, H], each token's (weighted) sum over its choices."""
        return F.embedding_bag(
            self.place, rows.flatten(0, 1).float(), mode="sum", per_sample_weights=weights
        )


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
    every token, where whole blocks can be moved.
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
        block_gate_up = gate_up.to(dtype).index_select(0, blocks.owner)
        block_down = down.to(dtype).index_select(0, blocks.owner)
        both = torch.bmm(x, block_gate_up.transpose(1, 2))  # [B, C, 2I]
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        y = torch.bmm(inner, block_down.transpose(1, 2))  # [B, C, H]
        ctx.save_for_backward(x, both, inner, y, block_gate_up, block_down, weights)
        ctx.blocks, ctx.dtype, ctx.num_experts = blocks, dtype, len(gate_up)
        return blocks.gather(y, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, both, inner, y, block_gate_up, block_down, weights = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        spread = blocks.spread(grads[0].to(ctx.dtype))  # [B, C, H]
        d_weights = (y * spread).sum(-1).float().flatten()[blocks.place]
        scale = weights.new_zeros(len(blocks.token))
        scale[blocks.place.flatten()] = weights.flatten()
        d_y = spread * scale.view(len(blocks.owner), -1, 1).to(ctx.dtype)
        d_inner = torch.bmm(d_y, block_down)
        gate, up = both.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_both = torch.cat((d_gate, d_inner * sigmoid * gate), dim=-1)
        d_hidden = blocks.gather(torch.bmm(d_both, block_gate_up)).to(grads[0].dtype)
        d_gate_up = _per_expert(torch.bmm(d_both.transpose(1, 2), x), ctx)
        d_down = _per_expert(torch.bmm(d_y.transpose(1, 2), inner), ctx)
        return d_hidden, d_weights, d_gate_up, d_down, None, None


def _per_expert(by_block: torch.Tensor, ctx: Any) -> torch.Tensor:
    """Adds the blocks of each expert: [B, ...] -> float32 [E, ...]."""
    total = by_block.new_zeros((ctx.num_experts, *by_block.shape[1:]), dtype=torch.float32)
    return total.index_add_(0, ctx.blocks.owner, by_block.float())


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
