"""Products in bfloat16 with everything else in float32, where it pays: in linear layers.

Autocast would do the same, but to the gates as well, which stay float32 in this model.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn


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
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(input.bfloat16(), self.weight.bfloat16(), bias).to(input.dtype)


def narrow_linears(module: nn.Module) -> None:
    """Replaces every linear layer below `module`; names and parameters stay what they are."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, NarrowLinear.of(child))
