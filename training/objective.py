"""What is minimised: cross-entropy and the gates' own losses, with the strengths of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

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
from chiasm.training.routing import RoutingRecord, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A step's micro-batches together: how many, their tokens, those that have labels, examples."""

    num_parts: int
    num_tokens: int
    num_labels: int
    num_examples: int

    @classmethod
    def of(cls, parts: Sequence[PackedBatch]) -> Whole:
        return cls(
            num_parts=len(parts),
            num_tokens=sum(part.num_tokens for part in parts),
            num_labels=sum(int((part.labels >= 0).sum()) for part in parts),
            num_examples=sum(part.num_examples for part in parts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Strengths, by default those of the bundled model; 0 leaves a term out. ERNIE has 1e-2 of
    orthogonality and of load balance and 1e-4 of z (`topk_gate.py`)."""

    is_token_balanced: bool = True
    """Divide by all tokens of the batch, or by those that have a label."""
    orthogonality: float = 1e-2
    orthogonality_by: Literal["loss", "step"] = "loss"
    """Part of the loss, or a step of its own after the optimiser's: ERNIE has both, the second as
    `OrthogonalCallback`."""
    load_balance: float = 1e-2
    z: float = 1e-6
    bias_step: float = 2e-5
    """How far the correction bias moves at each step. A bias that balances alone, by 2e-4 a step,
    held the gates back in short runs on a few tasks."""

    def loss(
        self, model: TrainingModel, batch: PackedBatch, passed: Forward, whole: Whole
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """A micro-batch's part in the loss of the `whole` step, and of the terms by name.

        Parts add up: to the cross-entropy of all labelled tokens of the step, and to the mean of
        the gates' losses over its micro-batches.
        """
        losses = model.token_losses(passed.hidden, batch.labels)
        terms = self._gate_terms(model, passed.records)
        divisor = whole.num_tokens if self.is_token_balanced else whole.num_labels
        main = token_balanced(losses, divisor, whole.num_labels)
        gates = self.load_balance * terms["load_balance"] + self.z * terms["z"]
        if self.orthogonality_by == "loss":
            gates = gates + self.orthogonality * terms["orthogonality"]
        scale = len(passed.records) * whole.num_parts
        values = {name: float(value.detach()) / scale for name, value in terms.items()}
        return main + gates / whole.num_parts, {"loss": float(main.detach()), **values}

    def _gate_terms(
        self, model: TrainingModel, records: list[RoutingRecord]
    ) -> dict[str, torch.Tensor]:
        """Sums over gates."""
        terms = {name: torch.zeros(()) for name in ("load_balance", "z", "orthogonality")}
        for record in records:
            gate = model.gate(record.layer, record.modality)
            logits = record.hidden.float() @ gate
            probs = torch.softmax(logits, dim=-1)
            chosen = probs.topk(record.expert_ids.shape[1], dim=-1).indices
            terms["load_balance"] = terms["load_balance"] + load_balance(probs, chosen)
            terms["z"] = terms["z"] + router_z(logits)
            terms["orthogonality"] = terms["orthogonality"] + self._orthogonality(gate)
        return terms

    def _orthogonality(self, gate: torch.Tensor) -> torch.Tensor:
        return orthogonality(gate if self.orthogonality_by == "loss" else gate.detach())

    def after_step(
        self,
        model: TrainingModel,
        chosen: Usage,
        learning_rate: float,
    ) -> None:
        """The moves that are no part of the optimiser: gates apart, biases towards balance.

        chosen: choices per expert in the step, by gate.
        """
        blocks = model.moe_blocks()
        for (modality, layer), counts in chosen.items():
            gate = blocks[layer].gate.bank(modality)
            if not gate.requires_grad:
                continue
            if self.orthogonality_by == "step" and self.orthogonality:
                orthogonalize_(gate, learning_rate * self.orthogonality)
            if self.bias_step:
                correct_(blocks[layer].moe_statics.bank(modality), counts, self.bias_step)


def sight_loss(model: TrainingModel, batch: PackedBatch, whole: Whole) -> torch.Tensor:
    """Cross-entropy of everything the probes read in a micro-batch, over the step's examples."""
    losses = [
        F.cross_entropy(logits.flatten(0, 1), batch.seen[name].labels.flatten(), reduction="sum")
        for name, logits in model.read(batch).items()
    ]
    return torch.stack(losses).sum() / whole.num_examples
