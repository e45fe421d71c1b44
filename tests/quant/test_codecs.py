"""What each precision costs Gaussian weights, in error and in bits, and what must not break it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant import int4, int8, table, tcq2
from chiasm.kernels.quant.formats import DenseMatrices, ExpertMatrices
from chiasm.model.expert_weights import MULTIPLE

ENCODERS: dict[str, Callable[..., ExpertMatrices]] = {
    "int8": int8.encode,
    "int4": int4.encode,
    "tcq2": tcq2.encode,
}
# Of N(0, 1) weights with 2560 inputs, and bits by weight of all that is stored. The error of any
# two-bit code is at least 0.0625, that of the best scalar one (Lloyd-Max) 0.1175.
LIMITS = {"int8": (8e-5, 8.02), "int4": (0.0095, 4.26), "tcq2": (0.081, 2.13)}
LLOYD_MAX = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])


def gaussian(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(1, n, k, generator=torch.Generator().manual_seed(seed))


def mse(matrices: ExpertMatrices, weight: torch.Tensor) -> float:
    error = matrices.dequantize(0, torch.float32).double() - weight[0].double()
    return float(error.square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("precision", ENCODERS)
def test_error_and_bits_of_gaussian_weights(precision: str, seed: int) -> None:
    weight = gaussian(40, 2560, seed)
    matrices = ENCODERS[precision](weight)
    error, bits = LIMITS[precision]
    assert mse(matrices, weight) <= error
    shared = 256 if precision == "tcq2" else 0  # the table, one for a whole model
    assert 8 * (matrices.nbytes - shared) / weight.numel() <= bits


@pytest.mark.parametrize("k", [512, 1536, 2560])
def test_tcq2_beats_every_scalar_code_of_two_bits(k: int) -> None:
    weight = gaussian(-(-80_000 // k), k, seed=k)
    levels = LLOYD_MAX[(weight[..., None] - LLOYD_MAX).abs().argmin(dim=-1)]
    scalar = float((levels - weight).square().sum() / weight.square().sum())
    assert mse(tcq2.encode(weight), weight) <= 0.75 * scalar


@pytest.mark.parametrize("precision", ENCODERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4])
def test_scales_of_any_size(precision: str, scale: float) -> None:
    weight = gaussian(4, 256, seed=3)
    plain, scaled = (ENCODERS[precision](w) for w in (weight, weight * scale))
    # bfloat16 scales of int4 round elsewhere.
    assert math.isclose(mse(scaled, weight * scale), mse(plain, weight), rel_tol=0.05)


@pytest.mark.parametrize("precision", ENCODERS)
@pytest.mark.parametrize("k", [16, 48, 64, 128, 132, 200])
def test_short_groups(precision: str, k: int) -> None:
    weight = gaussian(60, k, seed=k)
    matrices = ENCODERS[precision](weight)
    assert matrices.shape == (60, k)
    assert mse(matrices, weight) <= 1.6 * LIMITS[precision][0]


@pytest.mark.parametrize("precision", ENCODERS)
def test_zeros_stay_zeros_and_constants_stay_near(precision: str) -> None:
    weight = gaussian(6, 384, seed=5)
    weight[0, 0] = 0  # a row
    weight[0, 1, 128:256] = 0  # a group
    weight[0, 2] = 0.75
    weight[0, 3] = -0.001
    found = ENCODERS[precision](weight).dequantize(0, torch.float32)
    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert not found[1, 128:256].any() or precision == "int8"
    # Two bits with a table for Gaussian weights are worst at weights that are all alike.
    limit = 0.35 if precision == "tcq2" else 0.02
    for row in (2, 3):
        assert (found[row] / weight[0, row] - 1).square().mean() <= limit


@pytest.mark.parametrize("precision", ENCODERS)
def test_outliers_do_not_spoil_their_row(precision: str) -> None:
    weight = gaussian(8, 512, seed=6)
    weight[0, :, 7] = 30.0
    found = ENCODERS[precision](weight).dequantize(0, torch.float32)
    rest = (found - weight[0])[:, 128:]
    assert rest.square().mean() <= (0.01 if precision == "int8" else 0.09)


@pytest.mark.parametrize("precision", ["int4", "tcq2"])
def test_importance_moves_the_error_to_where_it_matters_less(precision: str) -> None:
    weight = gaussian(20, 256, seed=7)
    importance = torch.where(torch.arange(256) % 4 == 0, 50.0, 1.0)
    encode = int4.encode if precision == "int4" else tcq2.encode
    errors = [
        ((encode(weight, heed).dequantize(0, torch.float32) - weight[0]).square() * importance)
        .mean()
        .item()
        for heed in (None, importance)
    ]
    assert errors[1] < (0.97 if precision == "int4" else 0.8) * errors[0]


@pytest.mark.parametrize("precision", ["int4", "tcq2"])
def test_widths_that_cannot_be_packed_are_refused(precision: str) -> None:
    with pytest.raises(InvalidArgument, match=f"multiple of 4|even.*{MULTIPLE[precision] + 1}"):
        ENCODERS[precision](gaussian(2, MULTIPLE[precision] + 1, 0))


def test_the_table_is_the_one_that_training_makes() -> None:
    assert table.checksum(table.train()) == table.checksum(table.load())


def test_dense_matrices_are_what_they_hold() -> None:
    weight = gaussian(6, 10, 0)
    matrices = DenseMatrices(weight.bfloat16())
    x = gaussian(3, 10, 1)[0].bfloat16()
    assert torch.equal(matrices.linear(x, 0), x @ weight[0].bfloat16().t())
    assert (matrices.num_experts, matrices.shape, matrices.nbytes) == (1, (6, 10), 120)
