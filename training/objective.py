"""What is minimised: cross-entropy and the gates' own losses, with the strengths of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from chiasm.training.data.packing import PackedBatch
from chiasm.training.losses import (
    correct_,
    load_balance,
    orthogonality,
    orthogonalize_,
    router_z,
    token_balanced,
)
from chiasm.training.model import Forward, TrainingModel
from chiasm.training.routing import RoutingRecord
from chiasm.types import TOKEN_TEXT, Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Strengths; 0 leaves a term out."""

    is_token_balanced: bool = True
    """Divide by all tokens of the batch, or by those that have a label."""
    orthogonality: float = 1e-2
    orthogonality_by: Literal["loss", "step"] = "step"
    """Part of the loss, or a step of its own after the optimiser's."""
    load_balance: float = 1e-2
    z: float = 1e-4
    bias_step: float = 1e-3
    """How far the correction bias moves at each step."""

    def loss(
        self, model: TrainingModel, batch: PackedBatch, passed: Forward
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a pass, and the values of its terms by name."""
        losses = model.token_losses(passed.hidden, batch.labels)
        main = (
            token_balanced(losses, len(batch.labels)) if self.is_token_balanced else losses.mean()
        )
        terms = {name: [torch.zeros(())] for name in ("load_balance", "z", "orthogonality")}
        for record in passed.records:
            gate = model.gate(record.layer, record.modality)
            logits = record.hidden.float() @ gate
            probs = torch.softmax(logits, dim=-1)
            chosen = probs.topk(record.expert_ids.shape[1], dim=-1).indices
            terms["load_balance"].append(load_balance(probs, chosen))
            terms["z"].append(router_z(logits))
            terms["orthogonality"].append(self._orthogonality(gate))
        sums = {name: torch.stack(values).sum() for name, values in terms.items()}
        total = main + self.load_balance * sums["load_balance"] + self.z * sums["z"]
        if self.orthogonality_by == "loss":
            total = total + self.orthogonality * sums["orthogonality"]
        gates = max(len(passed.records), 1)
        values = {name: float(value.detach()) / gates for name, value in sums.items()}
        return total, {"loss": float(main.detach()), **values}

    def _orthogonality(self, gate: torch.Tensor) -> torch.Tensor:
        return orthogonality(gate if self.orthogonality_by == "loss" else gate.detach())

    def after_step(
        self, model: TrainingModel, records: list[RoutingRecord], learning_rate: float
    ) -> None:
        """The moves that are no part of the optimiser: gates apart, biases towards balance."""
        blocks = model.moe_blocks()
        for record in records:
            block = blocks[record.layer]
            gate = block.gate.bank(record.modality)
            if not gate.requires_grad:
                continue
            if self.orthogonality_by == "step" and self.orthogonality:
                orthogonalize_(gate, learning_rate * self.orthogonality)
            if self.bias_step:
                usage = torch.bincount(record.expert_ids.flatten(), minlength=gate.shape[1])
                correct_(block.moe_statics.bank(record.modality), usage, self.bias_step)


def usage(
    records: list[RoutingRecord], token_types: torch.Tensor, num_experts: int
) -> dict[tuple[Modality, int], torch.Tensor]:
    """Choices per expert, int64 [E], by the modality of the tokens and by layer.

    In a shared pool both modalities' tokens stand in one record.
    """
    masks = {Modality.TEXT: token_types == TOKEN_TEXT, Modality.VISION: token_types != TOKEN_TEXT}
    found = {}
    for record in records:
        if len(record.expert_ids) == len(token_types):  # all tokens: look which are whose
            choices = {modality: record.expert_ids[mask] for modality, mask in masks.items()}
        else:
            choices = {record.modality: record.expert_ids}
        for modality, ids in choices.items():
            if len(ids):
                counts = torch.bincount(ids.flatten(), minlength=num_experts)
                found[modality, record.layer] = counts
    return found
