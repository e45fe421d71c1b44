"""Products with one matrix: the fast paths are the plain product, and only where they may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm.kernels import dense, native


def matrices(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    return x, torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 33, 512, 513])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (96, 64), (130, 257), (64, 2560)])
@torch.no_grad()
def test_products_are_those_of_float32_rounded(rows: int, shape: tuple[int, int]) -> None:
    x, weight = matrices(rows, shape, torch.bfloat16, seed=rows)
    found, exact = dense.linear(x, weight), F.linear(x.double(), weight.double())
    assert found.dtype is torch.bfloat16
    # A rounding to eight bits of the result, and sums of float32 with products of bfloat16.
    bound = exact.abs() * 2**-8 + 2**-20 * F.linear(x.double().abs(), weight.double().abs())
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.usefixtures("any_processor")
@torch.no_grad()
def test_a_row_does_not_depend_on_the_few_beside_it() -> None:
    if not native.has_bfloat16():
        pytest.skip("not compiled for this processor")
    x, weight = matrices(7, (50, 96), torch.bfloat16)
    x = x[: dense.few_rows(x, weight)]
    together = dense.linear(x, weight)
    for rows in (x[:1], x.flip(0)[-1:]):
        assert torch.equal(dense.linear(rows, weight)[0], together[0])
    assert torch.equal(dense.linear(x.repeat(1, 2)[:, :96], weight), together)  # not contiguous


@torch.no_grad()
def test_float32_and_transposed_matrices_are_torchs_own() -> None:
    x, weight = matrices(2, (40, 40), torch.float32)
    assert torch.equal(dense.linear(x, weight), F.linear(x, weight))
    x, weight = matrices(2, (40, 40), torch.bfloat16)
    assert torch.equal(dense.linear(x, weight.t()), F.linear(x, weight.t()))


@torch.no_grad()
def test_rows_of_another_width_are_refused() -> None:
    x, weight = matrices(3, (8, 16), torch.bfloat16)
    with pytest.raises(RuntimeError):
        dense.linear(x[:, :8], weight)


def test_gradients_are_recorded() -> None:
    x, weight = matrices(2, (8, 16), torch.bfloat16)
    weight.requires_grad_()
    dense.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, x.sum(0).expand(8, 16))
