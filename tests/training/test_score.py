"""Exact match by one pass, and the entropy of loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from train_models import new_model, short_preset

from chiasm.training.data.encode import Encoder
from chiasm.training.data.packing import PackedBatch
from chiasm.training.data.stream import held_out
from chiasm.training.model import Forward, TrainingModel
from chiasm.training.score import exact_match, load_entropy
from chiasm.types import Modality

NUM_SAMPLES = 30


class Reader(torch.nn.Module):
    """Knows every next token; errs where it is told to, in the last token of an answer."""

    def __init__(self, model: TrainingModel, wrong: set[int]) -> None:
        super().__init__()
        self.model, self.config, self.language = model, model.config, self
        self._wrong, self._first = wrong, 0

    def forward(self, batch: PackedBatch) -> Forward:
        guess = batch.labels.clone()
        for index, rows in enumerate(torch.arange(len(guess)).split(list(batch.lengths))):
            last = rows[batch.labels[rows] >= 0][-1]
            if self._first + index in self._wrong:
                guess[last] = guess[last] + 1
        self._first += batch.num_examples
        return Forward(hidden=guess, records=self.model(batch).records)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        width = self.config.text.vocab_size
        return torch.nn.functional.one_hot(hidden.clamp(0, width - 1), width).float()


@pytest.mark.parametrize(("task", "wrong"), [("sums", {0, 7, 29}), ("count", set()), ("same", {3})])
def test_an_answer_counts_when_every_token_is_right(
    tmp_path: Path, task: str, wrong: set[int]
) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    encoder = Encoder.load(tmp_path / "description")
    reader = Reader(model, wrong)
    accuracy, usage = exact_match(reader, encoder, task, NUM_SAMPLES)
    num_samples = len(held_out(task, NUM_SAMPLES))
    assert accuracy == pytest.approx(1 - len(wrong) / num_samples)
    modalities = {Modality.TEXT} if task == "sums" else set(Modality)
    assert {modality for modality, _ in usage} == modalities
    text = model.config.text
    num_tokens = sum(encoder.encode(s).num_tokens for s in held_out(task, NUM_SAMPLES))
    for layer in text.moe_layers:
        chosen = sum(int(usage[modality, layer].sum()) for modality in modalities)
        assert chosen == num_tokens * text.moe_k


def test_a_model_that_knows_nothing_scores_nothing(tmp_path: Path) -> None:
    model = new_model(tmp_path / "description", short_preset(1, 1, 1, 1))
    accuracy, _ = exact_match(model, Encoder.load(tmp_path / "description"), "words", 10)
    assert accuracy == 0


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [([5, 5, 5, 5], 1.0), ([9, 0, 0, 0], 0.0), ([3, 3, 0, 0], 0.5), ([1, 2], None)],
)
def test_load_entropy(counts: list[int], entropy: float | None) -> None:
    shares = [c / sum(counts) for c in counts if c]
    expected = -sum(s * math.log(s) for s in shares) / math.log(len(counts))
    assert load_entropy(torch.tensor(counts)) == pytest.approx(expected)
    if entropy is not None:
        assert expected == pytest.approx(entropy)
