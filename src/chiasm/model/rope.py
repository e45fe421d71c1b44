"""3-D rotary position embedding of the text decoder.

Pair i of a head turns by p_axis(i) * theta^(-2i/d). The last `T` pairs (the lowest frequencies)
follow the temporal position, the pairs before them alternate between height (even i) and width (odd
i). Pairs are adjacent elements (2i, 2i+1). Source: transformers
`Ernie4_5_VLMoeTextRotaryEmbedding`; ERNIE `ernie/modeling.py` (`rope_3d`, `freq_allocation`).
"""

from __future__ import annotations

import torch

from chiasm.model.config import TextConfig


def rotary_tables(positions: torch.Tensor, config: TextConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every pair's angle.

    Args:
        positions: integers [3, T], rows temporal, height, width.

    Returns:
        cos and sin, each float32 [T, d/2].
    """
    pairs = config.head_dim // 2
    index = torch.arange(pairs, device=positions.device)
    # float32 powers, as the reference computes them: a float64 table would differ by an ulp.
    inv_freq = 1.0 / (
        config.rope_theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs))
    ).to(positions.device)
    num_spatial = pairs - config.mrope_section[2]
    axis = torch.where(index >= num_spatial, 0, 1 + index % 2)  # rows of `positions`
    angles = positions.float()[axis].transpose(0, 1) * inv_freq  # [T, d/2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of x [T, heads, d] in float32; returns x's dtype."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # [T, heads, d/2]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
