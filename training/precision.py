"""Products in bfloat16 with everything else in float32, where it pays: in linear layers.

Autocast would do the same, but to the gates as well, which stay float32 in this model. And it would
multiply as many rows as there are: oneDNN compiles a program for every shape it meets, which takes
longer (milliseconds) than most products here, and no two batches are of the same length.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_ROWS = 128
"""Products have a multiple of so many rows, so that few shapes come up."""


class NarrowLinear(nn.Linear):
    """A linear layer of float32 parameters, input and output, whose product is in bfloat16."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Shares the parameters of `linear`."""
        narrow = cls(1, 1, bias=False, device="meta")
        narrow.in_features, narrow.out_features = linear.in_features, linear.out_features
        narrow.weight, narrow.bias = linear.weight, linear.bias
        return narrow

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        out: torch.Tensor = _Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W^T of float32 x [T, K] and W [N, K]; the products of its gradients are narrow, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, matrix = _narrow(x), weight.bfloat16()
        ctx.save_for_backward(rows, matrix)
        return (rows @ matrix.T)[: len(x)].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, matrix = ctx.saved_tensors
        gradient = _narrow(grads[0])
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            (gradient @ matrix)[: len(grads[0])].float() if wants_x else None,
            (gradient.T @ rows).float() if wants_weight else None,
        )


def _narrow(x: torch.Tensor) -> torch.Tensor:
    """[T, K] in bfloat16, filled up with rows of zeros."""
    narrow = x.new_empty(round_up(len(x), _ROWS), x.shape[1], dtype=torch.bfloat16)
    narrow[: len(x)] = x
    narrow[len(x) :] = 0
    return narrow


def round_up(number: int, unit: int) -> int:
    """To a multiple of `unit`."""
    return -(-number // unit) * unit


def narrow_linears(module: nn.Module) -> None:
    """Replaces every linear layer below `module`; names and parameters stay what they are."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, NarrowLinear.of(child))
