"""WINT2 against its four steps, written out for single weights."""

from __future__ import annotations

import math

import pytest
import torch
from quant.wint2_files import Stored, random_matrix

from chiasm.kernels.quant.wint2 import Wint2Matrices


def weight_at(stored: Stored, k: int, n: int) -> float:
    """The four steps of FastDeploy's wint2x_unzip.h; float32 where it has it."""
    byte = stored["quant_weight"][k // 4, n].float()
    code = math.floor(float(byte * stored["code_scale"][n] + stored["code_zp"][n] + 0.5))
    window = ((code >> (9, 6, 3, 0)[k % 4]) & 63) - 32
    nibble = (int(stored["weight_scale"][k // 128, n]) >> (4 if (k // 64) % 2 == 0 else 0)) & 15
    return window * nibble * float(stored["super_scales"][n])


@pytest.mark.parametrize(("k", "n", "seed"), [(128, 5, 0), (384, 3, 1), (256, 8, 2)])
def test_every_weight_is_that_of_the_four_steps(k: int, n: int, seed: int) -> None:
    stored = random_matrix(k, n, seed)
    matrices = Wint2Matrices(
        stored["quant_weight"].t()[None].contiguous(),
        stored["weight_scale"].t()[None].contiguous(),
        stored["code_scale"][None],
        stored["code_zp"][None],
        stored["super_scales"][None],
    )
    assert matrices.shape == (n, k)
    expected = torch.tensor([[weight_at(stored, i, j) for i in range(k)] for j in range(n)])
    assert torch.equal(matrices.dequantize(0, torch.bfloat16), expected.bfloat16())
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matrices.linear(x, 0), x @ matrices.dequantize(0, torch.float32).t())
