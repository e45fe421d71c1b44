"""The matrices of the language model, in full width or in int8, and those of the vision model."""

from __future__ import annotations

import torch
from torch import nn

from chiasm.kernels import dense
from chiasm.kernels.quant.formats import Int8Matrices


class Matrix(nn.Module):
    """What the matrices have in common: `weight` [N, K], or `coded` in its place."""

    weight: torch.Tensor
    coded: Int8Matrices | None = None
    """A stack of one; the parameter is gone then."""

    def hold(self, coded: Int8Matrices) -> None:
        """Takes int8 in place of the parameter. For inference."""
        self.coded = coded
        self.register_parameter("weight", None)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N], of x's dtype; fast for the few rows of a decode step."""
        if self.coded is not None:
            return self.coded.linear(x, 0)
        return dense.linear(x, self.weight)


class Linear(nn.Linear, Matrix):
    """`nn.Linear` without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.multiply(input)


class Projection(nn.Linear):
    """`nn.Linear` of the vision model."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dense.linear(input, self.weight, self.bias)


class Embedding(nn.Embedding, Matrix):
    """`nn.Embedding`, which may be the head too."""

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """int64 [T] -> [T, K]. dtype: the model's, which codes do not tell."""
        if self.coded is None:
            return self(ids)  # type: ignore[no-any-return]
        codes, scale = self.coded.codes[0], self.coded.scale[0]
        return (codes[ids].float() * scale[ids, None]).to(dtype)
