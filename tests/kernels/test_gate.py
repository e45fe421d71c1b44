"""The top-k gate against its definition, token by token."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.gate import topk_gate

TOLERANCE = 1e-6


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "k", "seed"),
    [(1, 8, 4, 1, 0), (7, 16, 16, 4, 1), (33, 24, 64, 6, 2), (5, 8, 8, 8, 3)],
)
def test_selects_by_biased_and_weighs_by_unbiased_probability(
    tokens: int, hidden: int, experts: int, k: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    weight = torch.randn(hidden, experts, generator=g)
    bias = torch.randn(experts, generator=g) * 0.3
    ids, weights = topk_gate(x, weight, bias, top_k=k, norm_min=1e-12)
    assert ids.dtype is torch.int32
    for t in range(tokens):
        logits = [float((x[t].double() * weight[:, e].double()).sum()) for e in range(experts)]
        top = max(logits)
        exp = [torch.tensor(v - top, dtype=torch.float64).exp().item() for v in logits]
        probs = [v / sum(exp) for v in exp]
        biased = sorted(range(experts), key=lambda e: -(probs[e] + float(bias[e])))[:k]
        assert sorted(ids[t].tolist()) == sorted(biased)
        total = sum(probs[e] for e in biased)
        for e, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            assert w == pytest.approx(probs[e] / total, abs=TOLERANCE)


def test_vanishing_probabilities_are_divided_by_norm_min() -> None:
    """Experts that only the bias selects have probability zero: no NaN comes of it."""
    x, weight = torch.ones(1, 1), torch.tensor([[200.0, 0.0, 0.0]])
    ids, weights = topk_gate(x, weight, torch.tensor([0.0, 5.0, 5.0]), top_k=2, norm_min=1e-12)
    assert sorted(ids[0].tolist()) == [1, 2]
    assert weights.tolist() == [[0.0, 0.0]]


def test_gate_is_float32_for_bfloat16_hidden_states() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(9, 32, generator=g).bfloat16()
    weight, bias = torch.randn(32, 16, generator=g), torch.zeros(16)
    ids, weights = topk_gate(x, weight, bias, top_k=4, norm_min=1e-12)
    ids32, weights32 = topk_gate(x.float(), weight, bias, top_k=4, norm_min=1e-12)
    assert weights.dtype is torch.float32
    assert torch.equal(ids, ids32)
    assert torch.equal(weights, weights32)
