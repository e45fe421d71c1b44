"""Losses and balance rules against their formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from chiasm.training.losses import (
    correct_,
    load_balance,
    orthogonality,
    orthogonalize_,
    router_z,
    token_balanced,
)

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
TOLERANCE = 1e-5
RANDOM_MEAN = 0.02
"""Of the mean of forty draws."""


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@SEEDS
def test_orthogonality(seed: int) -> None:
    weight = draw(12, 5, seed=seed)
    total = 0.0
    for i in range(5):
        for j in range(5):
            one, other = weight[:, i], weight[:, j]
            cosine = float(one @ other) / (float(one.norm()) * float(other.norm()))
            total += (cosine - (i == j)) ** 2
    assert float(orthogonality(weight)) == pytest.approx(total / 25, abs=TOLERANCE)


def test_orthogonality_gradient() -> None:
    weight = draw(7, 4, seed=0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(orthogonality, (weight,))


def test_orthogonality_is_zero_for_orthogonal_experts_of_any_length() -> None:
    weight = torch.linalg.qr(draw(9, 6, seed=0)).Q * torch.arange(1, 7)
    assert float(orthogonality(weight)) < TOLERANCE


@pytest.mark.parametrize(("width", "num_experts"), [(128, 64), (128, 128)])
def test_orthogonality_of_random_gates(width: int, num_experts: int) -> None:
    """A cosine's square is 1 / width on average, and E (E - 1) of the E^2 terms are of pairs."""
    values = [float(orthogonality(draw(width, num_experts, seed=seed))) for seed in range(40)]
    expected = (num_experts - 1) / num_experts / width
    assert sum(values) / len(values) == pytest.approx(expected, rel=RANDOM_MEAN)


def test_the_step_of_its_own_is_gradient_descent() -> None:
    weight = draw(8, 6, seed=4)
    leaf = weight.clone().requires_grad_()
    expected = weight - 0.3 * torch.autograd.grad(orthogonality(leaf), leaf)[0]
    parameter = torch.nn.Parameter(weight.clone())
    orthogonalize_(parameter, 0.3)
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.grad is None
    before = float(orthogonality(weight))
    for _ in range(50):
        orthogonalize_(parameter, 10.0)
    assert float(orthogonality(parameter.detach())) < before / 10


@SEEDS
def test_token_balanced(seed: int) -> None:
    """The value is the mean of the labelled tokens, the gradient that of their sum over all."""
    logits = draw(6, 9, seed=seed).requires_grad_()
    labels = torch.tensor([3, 1, 4, 1, 5, 8])
    losses = F.cross_entropy(logits, labels, reduction="none")
    balanced = token_balanced(losses, num_tokens=40, num_labels=6)
    assert balanced.item() == pytest.approx(losses.mean().item(), abs=TOLERANCE)
    (grad,) = torch.autograd.grad(balanced, logits)
    probs = logits.detach().softmax(-1)
    expected = (probs - F.one_hot(labels, 9)) / 40
    torch.testing.assert_close(grad, expected, atol=TOLERANCE, rtol=TOLERANCE)


@SEEDS
def test_load_balance(seed: int) -> None:
    probs = draw(11, 4, seed=seed).softmax(-1).requires_grad_()
    ids = probs.topk(2).indices
    expected, gradient = 0.0, torch.zeros(11, 4)
    for expert in range(4):
        share = sum(expert in row for row in ids.tolist()) / 11
        expected += share * sum(probs[:, expert].tolist()) / 11
        gradient[:, expert] = 4 * share / 11
    loss = load_balance(probs, ids)
    assert loss.item() == pytest.approx(4 * expected, abs=TOLERANCE)
    torch.testing.assert_close(torch.autograd.grad(loss, probs)[0], gradient)


def test_even_load_is_the_least_and_equals_top_k() -> None:
    ids = torch.tensor([[0, 1], [2, 3]])
    assert float(load_balance(torch.full((2, 4), 0.25), ids)) == pytest.approx(2.0)


@SEEDS
def test_router_z(seed: int) -> None:
    logits = draw(5, 3, seed=seed)
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / 5
    assert float(router_z(logits)) == pytest.approx(expected, abs=TOLERANCE)


def test_correction_moves_towards_balance() -> None:
    bias = torch.nn.Parameter(torch.tensor([0.5, 0.0, 0.0, -0.5]), requires_grad=False)
    correct_(bias, torch.tensor([9, 4, 1, 2]), 0.01)  # mean 4
    torch.testing.assert_close(bias.detach(), torch.tensor([0.49, 0.0, 0.01, -0.49]))
