"""The gate's Triton kernel against the reference; interpreted where there is no GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from chiasm import errors
from chiasm.kernels import gate
from chiasm.kernels.gate import launch, reference

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 2e-6
NORM_MIN = 1e-12

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(tokens: int, depth: int, experts: int, seed: int) -> Drawn:
    """Hidden states, weights and biases that matter to the choice."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, depth, generator=g)
    weight = torch.randn(depth, experts, generator=g) * 2 / depth**0.5
    bias = torch.randn(experts, generator=g) * 0.3
    return hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)


def assert_equal(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> None:
    ids, weights = launch.topk_gate(hidden, weight, bias, top_k=k, norm_min=NORM_MIN)
    expected = reference.topk_gate(hidden, weight, bias, top_k=k, norm_min=NORM_MIN)
    assert ids.dtype is torch.int32
    assert torch.equal(ids, expected[0])
    assert weights.dtype is torch.float32
    assert (weights - expected[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "depth", "experts", "k", "dtype"),
    [
        (1, 128, 64, 6, torch.float32),
        (17, 100, 64, 6, torch.float16),
        (33, 72, 24, 5, torch.bfloat16),
        (16, 64, 4, 4, torch.float32),
        (3, 16, 1, 1, torch.float32),
        (5, 48, 300, 8, torch.float32),
    ],
)
def test_equals_reference(
    tokens: int, depth: int, experts: int, k: int, dtype: torch.dtype
) -> None:
    hidden, weight, bias = draw(tokens, depth, experts, seed=experts)
    assert_equal(hidden.to(dtype), weight, bias, k)


@pytest.mark.parametrize("seed", range(8))
def test_equals_reference_on_random_shapes(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens, depth, experts = (
        int(torch.randint(1, high, (1,), generator=g)) for high in (40, 150, 80)
    )
    k = 1 + int(torch.randint(0, min(8, experts), (1,), generator=g))
    assert_equal(*draw(tokens, depth, experts, seed), k)


def test_of_equal_experts_the_lowest_ids_come_first() -> None:
    hidden, weight, bias = torch.ones(2, 8), torch.zeros(8, 12), torch.zeros(12)
    bias[[3, 9, 10]] = 0.5
    ids, weights = launch.topk_gate(
        hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), top_k=5, norm_min=NORM_MIN
    )
    assert ids.tolist() == [[3, 9, 10, 0, 1]] * 2
    assert weights.tolist() == [[pytest.approx(0.2)] * 5] * 2


def test_vanishing_probabilities_are_divided_by_norm_min() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[200.0, 0.0, 0.0]])
    bias = torch.tensor([0.0, 6.0, 5.0])
    assert_equal(hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
def test_a_token_of_nan_spoils_no_other_and_still_names_experts() -> None:
    hidden, weight, bias = draw(9, 40, 20, seed=1)
    clean = launch.topk_gate(hidden, weight, bias, top_k=3, norm_min=NORM_MIN)
    hidden[4] = float("nan")
    ids, weights = launch.topk_gate(hidden, weight, bias, top_k=3, norm_min=NORM_MIN)
    others = [t for t in range(9) if t != 4]
    assert torch.equal(ids[others], clean[0][others])
    assert torch.equal(weights[others], clean[1][others])
    assert weights[4].isnan().all()
    assert len({e for e in ids[4].tolist() if 0 <= e < 20}) == 3


def test_a_token_gets_the_same_bits_in_any_batch() -> None:
    hidden, weight, bias = draw(37, 80, 32, seed=2)
    whole = launch.topk_gate(hidden, weight, bias, top_k=4, norm_min=NORM_MIN)
    for t in (0, 5, 36):
        alone = launch.topk_gate(hidden[t : t + 1], weight, bias, top_k=4, norm_min=NORM_MIN)
        for found, expected in zip(alone, whole, strict=True):
            assert torch.equal(found[0], expected[t])


def test_rows_may_be_strided_and_none_may_be_there() -> None:
    hidden, weight, bias = draw(6, 96, 16, seed=3)
    weight = weight[:48]
    strided = hidden[:, 24:72]
    found = launch.topk_gate(strided, weight, bias, top_k=4, norm_min=NORM_MIN)
    expected = launch.topk_gate(strided.contiguous(), weight, bias, top_k=4, norm_min=NORM_MIN)
    assert all(map(torch.equal, found, expected))
    ids, weights = launch.topk_gate(strided[:0], weight, bias, top_k=4, norm_min=NORM_MIN)
    assert ids.shape == weights.shape == (0, 4)


def test_what_does_not_fit_together_is_refused() -> None:
    hidden, weight, bias = draw(4, 32, 16, seed=4)
    for bad in [
        (hidden.double(), weight, bias, 4),
        (hidden, weight.half(), bias, 4),
        (hidden[:, :31], weight, bias, 4),
        (hidden.t().contiguous().t(), weight, bias, 4),
        (hidden, weight, bias[:15], 4),
        (hidden, weight, bias, 17),
        (hidden, weight, bias, 0),
    ]:
        with pytest.raises(errors.Internal):
            launch.topk_gate(*bad[:3], top_k=bad[3], norm_min=NORM_MIN)


def test_training_and_huge_banks_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "is_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    hidden, weight, bias = draw(5, 32, 16, seed=5)
    weight.requires_grad_()
    ids, weights = gate.topk_gate(hidden, weight, bias, top_k=2, norm_min=NORM_MIN)
    weights[:, 0].sum().backward()
    assert weight.grad is not None
    monkeypatch.setattr(reference, "topk_gate", lambda *_, **__: "reference")
    with torch.inference_mode():
        again, _ = gate.topk_gate(hidden, weight, bias, top_k=2, norm_min=NORM_MIN)
        huge = torch.zeros(32, launch.MAX_EXPERTS + 1)
        large = gate.topk_gate(hidden, huge, huge[0], top_k=2, norm_min=NORM_MIN)
    assert torch.equal(again, ids)
    assert large == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_equals_reference_at_full_size(tokens: int) -> None:
    hidden, weight, bias = draw(tokens, 2560, 64, seed=tokens)
    ids, weights = launch.topk_gate(hidden.bfloat16(), weight, bias, top_k=6, norm_min=NORM_MIN)
    expected = reference.topk_gate(hidden.bfloat16(), weight, bias, top_k=6, norm_min=NORM_MIN)
    same = ids == expected[0]  # the order of sums differs: near-ties may fall differently
    assert same.float().mean() > 0.999
    assert (weights - expected[1])[same].abs().max() <= 10 * TOLERANCE
