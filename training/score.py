"""What a model in training knows: exact answers, by one pass instead of token by token."""

from __future__ import annotations

import torch

from chiasm.training.data.encode import Encoder
from chiasm.training.data.packing import packed
from chiasm.training.data.stream import held_out
from chiasm.training.model import TrainingModel
from chiasm.training.routing import Usage, add_usage, choices_by_modality

_BATCH_TOKENS = 4096


@torch.no_grad()
def exact_match(
    model: TrainingModel, encoder: Encoder, task: str, num_samples: int
) -> tuple[float, Usage]:
    """Share of held-out samples whose answer is right in every token, and the experts chosen.

    A greedy answer is the expected one just when the most likely token is right at each of its
    places, given the places before; so the expected answer can be read along.
    """
    examples = [encoder.encode(sample) for sample in held_out(task, num_samples)]
    num_experts = model.config.text.num_experts
    usage: Usage = {}
    num_right = 0
    for batch in packed(examples, _BATCH_TOKENS):
        passed = model(batch)
        found = choices_by_modality(passed.records, batch.token_types, num_experts)
        add_usage(usage, found)
        guessed = model.language.logits(passed.hidden).argmax(-1)
        right = (guessed == batch.labels) | (batch.labels < 0)
        num_right += sum(bool(part.all()) for part in torch.split(right, list(batch.lengths)))
    return num_right / len(examples), usage


def load_entropy(counts: torch.Tensor) -> float:
    """Entropy of an expert load over that of an even one, 0..1. counts: int64 [E]."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum() / torch.tensor(float(len(counts))).log())
