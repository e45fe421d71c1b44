"""Grouped experts against the kernel's specification: values, gradients, uneven loads."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.gate import topk_gate
from chiasm.kernels.moe.reference import ShardWeights, shard_partial
from chiasm.kernels.quant.formats import DenseMatrices
from chiasm.training.routing import Blocks, grouped_swiglu

TOLERANCE = 2e-5
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
BFLOAT16_RATIO = 0.02
"""RMS of the error over RMS of the value: a few bfloat16 roundings."""


def inputs(
    num_tokens: int, top_k: int, num_experts: int, *, skew: float, seed: int
) -> tuple[torch.Tensor, Tensors]:
    """Expert ids [T, K], and hidden, weights, gate_up, down that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = 16, 6
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    scores += skew * torch.arange(num_experts)
    ids = scores.topk(top_k).indices
    tensors = (
        torch.randn(num_tokens, hidden, generator=generator),
        torch.rand(num_tokens, top_k, generator=generator),
        torch.randn(num_experts, 2 * width, hidden, generator=generator) / hidden**0.5,
        torch.randn(num_experts, hidden, width, generator=generator) / width**0.5,
    )
    for tensor in tensors:
        tensor.requires_grad_()
    return ids, tensors


def reference(ids: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    hidden, weights, gate_up, down = tensors
    bank = ShardWeights(first=0, gate_up=DenseMatrices(gate_up), down=DenseMatrices(down))
    rows, values = shard_partial(hidden, ids.int(), weights, bank)
    assert torch.equal(rows, torch.arange(len(hidden), dtype=torch.int32))
    return values


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "skew"),
    # The last one has four blocks for each of two experts.
    [(1, 1, 1, 0.0), (7, 2, 5, 0.0), (90, 3, 8, 1.0), (200, 2, 4, 9.0), (200, 2, 16, 9.0)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients(
    num_tokens: int, top_k: int, num_experts: int, skew: float, seed: int
) -> None:
    ids, tensors = inputs(num_tokens, top_k, num_experts, skew=skew, seed=seed)
    expected = reference(ids, tensors)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)
    blocks = Blocks.lay_out(ids, num_experts)
    values = grouped_swiglu(*tensors, blocks, torch.float32)
    grads = torch.autograd.grad((values * weight).sum(), tensors)
    torch.testing.assert_close(values, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=TOLERANCE, rtol=TOLERANCE)


def test_bfloat16_is_near() -> None:
    ids, tensors = inputs(300, 2, 4, skew=0.5, seed=3)
    blocks = Blocks.lay_out(ids, 4)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        values = grouped_swiglu(*tensors, blocks, dtype)
        results.append((values, *torch.autograd.grad(values.square().sum(), tensors)))
    for exact, near in zip(*results, strict=True):
        assert near.dtype == torch.float32
        error = (near - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 0 < error < BFLOAT16_RATIO


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "skew"),
    [(0, 6, 0.0), (1, 6, 0.0), (200, 6, 2.0), (200, 16, 0.0), (200, 16, 9.0)],
)
def test_blocks_hold_every_choice_once(num_tokens: int, num_experts: int, skew: float) -> None:
    ids, _ = inputs(num_tokens, 3, num_experts, skew=skew, seed=0)
    blocks = Blocks.lay_out(ids, num_experts)
    assert len(set(blocks.place.flatten().tolist())) == ids.numel()
    assert torch.equal(blocks.token[blocks.place], torch.arange(num_tokens)[:, None].expand(-1, 3))
    assert torch.equal(blocks.owner[blocks.place // blocks.rows], ids)
    assert int((blocks.token == num_tokens).sum()) == len(blocks.token) - ids.numel()
    assert torch.equal(blocks.owner[:num_experts], torch.arange(num_experts))


@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_padding_stays_within_bounds(skew: float) -> None:
    """However unevenly experts are chosen: twice the mean for each, and half as much again."""
    ids, _ = inputs(3000, 3, 64, skew=skew, seed=0)
    blocks = Blocks.lay_out(ids, 64)
    assert len(blocks.token) < 3.5 * ids.numel()
    assert (len(blocks.owner) == 64) == (skew == 0.0)


def test_the_gate_learns_through_the_weights() -> None:
    """Every expert's column of the gate gets a gradient from the tokens it was chosen for."""
    _, (hidden, _, gate_up, down) = inputs(60, 2, 5, skew=0.0, seed=1)
    gate = torch.randn(16, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    chosen, weights = topk_gate(hidden, gate, torch.zeros(5), top_k=2, norm_min=1e-12)
    blocks = Blocks.lay_out(chosen.long(), 5)
    values = grouped_swiglu(hidden, weights, gate_up, down, blocks, torch.float32)
    (grad,) = torch.autograd.grad(values.square().sum(), gate)
    assert (grad.abs().sum(0) > 0).all()
