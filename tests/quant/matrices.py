"""Random matrices in every format, made of codes and scales rather than encoded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from chiasm.kernels.quant.formats import (
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
    num_groups,
)

SHAPES = [
    *((3, 40, 256), (2, 33, 128), (2, 7, 16), (2, 5, 48), (1, 9, 132), (2, 70, 384), (2, 150, 332))
]
"""[E, N, K]: whole groups and short ones, odd numbers of rows."""

ODD_SHAPES = {"int8": (1, 70, 131), "int4": (1, 70, 130), "tcq2": (1, 70, 140)}
"""K is what a format may have at most oddly."""


def int8(experts: int, n: int, k: int, seed: int = 0) -> Int8Matrices:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (experts, n, k), generator=g).to(torch.int8)
    return Int8Matrices(codes, torch.rand(experts, n, generator=g) * 0.01)


def int4(experts: int, n: int, k: int, seed: int = 0) -> Int4Matrices:
    g = torch.Generator().manual_seed(seed)
    scales = torch.rand(experts, n, num_groups(k), generator=g).bfloat16()
    zeros = torch.randn(experts, n, num_groups(k), generator=g).bfloat16()
    return Int4Matrices(_bytes(g, experts, n, k // 2), scales, zeros)


def tcq2(experts: int, n: int, k: int, seed: int = 0) -> Tcq2Matrices:
    g = torch.Generator().manual_seed(seed)
    table = torch.randint(-127, 128, (256,), generator=g).to(torch.int8)
    row = torch.rand(experts, n, generator=g) * 1e-4
    local = _bytes(g, experts, n, num_groups(k))
    return Tcq2Matrices(_bytes(g, experts, n, k // 4), local, row, table)


FORMATS: dict[str, Callable[..., ExpertMatrices]] = {"int8": int8, "int4": int4, "tcq2": tcq2}


def _bytes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
