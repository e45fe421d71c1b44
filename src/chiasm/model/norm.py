"""Root-mean-square norm, as the text model and the resampler use it."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = weight * cast(x / sqrt(mean(x^2) + eps)) over the last dimension.

    The norm is float32; it is cast to the model's dtype before the multiply by the weight, an order
    that shows in bfloat16. Zhang and Sennrich 2019, arXiv:1910.07467; rounding as in `Ernie4_5`.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] in the model's dtype -> same shape and dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)
