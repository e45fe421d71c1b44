"""The variable-resolution resampler: ViT features in, decoder embeddings out.

Merges 2 x 2 patches, then pairs of frames, each by concatenation and a small MLP, and projects to
the decoder's width. A still image counts as two equal frames. Reference: `Ernie4_5_VLMoe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from chiasm.model.config import TextConfig, VisionConfig
from chiasm.model.linear import Projection
from chiasm.model.norm import RMSNorm
from chiasm.types import Grid


def merge_mlp(in_size: int, out_size: int, eps: float) -> nn.Sequential:
    """Linear, GELU (the exact one), Linear, LayerNorm; the checkpoint names them 0, 2 and 3."""
    return nn.Sequential(
        Projection(in_size, out_size),
        nn.GELU(),
        Projection(out_size, out_size),
        nn.LayerNorm(out_size, eps=eps),
    )


def merge_frames(x: torch.Tensor, num_frames: int, merge_size: int) -> torch.Tensor:
    """Concatenates each row with its counterparts in the next merge_size - 1 frames.

    x [t*S, D] of one item -> [max(t / merge_size, 1) * S, merge_size * D]; an only frame is joined
    with itself.
    """
    if num_frames == 1:
        return x.repeat(1, merge_size)
    groups = x.view(num_frames // merge_size, merge_size, -1, x.shape[-1])
    return groups.transpose(1, 2).flatten(2).flatten(0, 1)


class Resampler(nn.Module):
    """The adapter. Parameter names are the checkpoint's names below `model.resampler_model.`."""

    def __init__(self, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        self.spatial_merge_size = vision.spatial_merge_size
        self.temporal_merge_size = vision.temporal_merge_size
        width = vision.hidden_size * vision.spatial_merge_size**2
        eps = vision.layer_norm_eps
        self.spatial_linear = merge_mlp(width, width, eps)
        self.temporal_linear = merge_mlp(width * vision.temporal_merge_size, width, eps)
        self.mlp = Projection(width, text.hidden_size)
        self.after_norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """features [N, hidden] of all items in order -> embeddings, `geometry.num_tokens` rows per
        item, [tokens, text_hidden].

        Rows of an item are ordered frame pair, block row, block column. Raises ValueError for an
        item of several frames that cannot be paired.
        """
        block = self.spatial_merge_size**2
        if any(grid.t > 1 and grid.t % self.temporal_merge_size for grid in grids):
            raise ValueError(f"frames of {list(grids)} cannot be merged")
        x = self.spatial_linear(features.reshape(len(features) // block, -1))
        items = x.split([grid.num_patches // block for grid in grids])
        merged = [
            merge_frames(item, grid.t, self.temporal_merge_size)
            for item, grid in zip(items, grids, strict=True)
        ]
        x = self.mlp(self.temporal_linear(torch.cat(merged)))
        embeddings: torch.Tensor = self.after_norm(x)
        return embeddings
