"""Sampling: greedy, filters, and independence of everything but seed and step."""

from __future__ import annotations

import pytest
import torch

from chiasm.services.decoder.sampler import sample
from chiasm.services.decoder.sequence import Sampling

NUM_DRAWS = 4000
TOLERANCE = 0.03


def draws(logits: torch.Tensor, **params: float | int) -> list[int]:
    sampling = Sampling(max_tokens=1, seed=11, **params)  # type: ignore[arg-type]
    return [sample(logits, sampling, step) for step in range(NUM_DRAWS)]


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sample(logits, Sampling(max_tokens=1, temperature=0), 0) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    found = torch.bincount(torch.tensor(draws(logits, temperature=temperature)), minlength=4)
    expected = torch.softmax(logits / temperature, dim=-1)
    assert torch.allclose(found / NUM_DRAWS, expected, atol=TOLERANCE)


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(torch.tensor([1.0, 0.9, 1.1, 0.8]), top_k=2)) == {0, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, top_p=0.6)) == {0, 1}
    assert set(draws(logits, top_p=0.5)) == {0}
    assert set(draws(logits, top_p=1e-9)) == {0}


def test_a_seed_and_a_step_fix_the_token() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    one, other = (Sampling(max_tokens=1, seed=s) for s in (2**64 - 1, 6))
    first = [sample(logits, one, step) for step in range(50)]
    assert first == [sample(logits, one, step) for step in range(50)]
    assert first != [sample(logits, other, step) for step in range(50)]
    assert len(set(first)) > 10
