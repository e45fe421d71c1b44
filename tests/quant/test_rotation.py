"""The rotation of the inputs: exact, and what it is for."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant import tcq2
from chiasm.kernels.quant.hadamard import RotatedMatrices, rotate, rotate_back


@pytest.mark.parametrize("k", [128, 384])
def test_products_stay_and_back_is_back(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, weight = torch.randn(4, k, generator=g), torch.randn(6, k, generator=g)
    torch.testing.assert_close(rotate(x) @ rotate(weight).t(), x @ weight.t(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate_back(rotate(x)), x, atol=1e-5, rtol=0)


def test_an_even_row_is_spread() -> None:
    assert rotate(torch.ones(1, 128)).abs().max() < 4


def test_heavy_tails_lose_less() -> None:
    """Student's t with 4 degrees of freedom."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(5, 60, 512, generator=g)
    weight = (normal[0] / normal[1:].square().mean(dim=0).sqrt())[None]
    plain = tcq2.encode(weight)
    rotated = RotatedMatrices(tcq2.encode(rotate(weight)))
    errors = [
        float((m.dequantize(0, torch.float32) - weight[0]).square().sum() / weight.square().sum())
        for m in (plain, rotated)
    ]
    assert errors[1] < 0.085 < errors[0]
    x = torch.randn(3, 512, generator=g)
    expected = x @ rotated.dequantize(0, torch.float32).t()
    torch.testing.assert_close(rotated.linear(x, 0), expected, atol=1e-3, rtol=1e-4)
    assert rotated.shape == plain.shape
    assert rotated.nbytes == plain.nbytes


def test_other_widths_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="multiple of 128 inputs, not 64"):
        rotate(torch.ones(1, 64))
