"""The vision transformer: patches in, one feature row per patch out.

Every frame attends to itself alone, so frames of any number and size share one forward pass, and a
long video may be cut between frames. Reference: `Ernie4_5_VLMoe` (DFNRope ViT).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from chiasm.model.config import VisionConfig
from chiasm.model.linear import Projection
from chiasm.types import Grid


class Frames(NamedTuple):
    """A run of consecutive frames of equal length."""

    num_frames: int
    num_patches: int


class Rotation(NamedTuple):
    """cos and sin of the rotary angles, float32 [N, 1, head_dim]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates x [N, heads, head_dim] in float32; element j pairs with j + head_dim / 2."""
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        rotated = wide * self.cos + torch.cat((-second, first), dim=-1) * self.sin
        return rotated.to(x.dtype)


def frame_runs(grids: Sequence[Grid]) -> list[Frames]:
    """The frames of all items in order, neighbours of equal length joined into one batch."""
    runs = groupby(grids, key=lambda grid: grid.h * grid.w)
    return [Frames(sum(grid.t for grid in run), length) for length, run in runs]


def patch_coordinates(grid: Grid, merge_size: int, device: torch.device) -> torch.Tensor:
    """Row and column of each patch of an item, int64 [N, 2].

    Patches lie block by block: the merge_size x merge_size patches of a block are consecutive.
    Every frame repeats the same coordinates.
    """
    shape = (grid.h // merge_size, grid.w // merge_size, merge_size, merge_size)
    rows = torch.arange(grid.h, device=device).view(shape[0], 1, merge_size, 1).expand(shape)
    cols = torch.arange(grid.w, device=device).view(1, shape[1], 1, merge_size).expand(shape)
    frame = torch.stack((rows, cols), dim=-1).reshape(-1, 2)
    return frame.repeat(grid.t, 1)


def rotation(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> Rotation:
    """Angles of the axial rope: half of the frequencies turn by row, the other half by column.

    frequency_j = rope_theta^(-2j / (head_dim / 2)), j < head_dim / 4; the head_dim / 2 angles are
    repeated to head_dim.
    """
    axis_dim = config.hidden_size // config.num_heads // 2
    steps = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (steps / axis_dim)
    coordinates = torch.cat(
        [patch_coordinates(grid, config.spatial_merge_size, device) for grid in grids]
    )
    angles = (coordinates[..., None].float() * frequencies).flatten(1)  # [N, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return Rotation(angles.cos(), angles.sin())


class PatchEmbed(nn.Module):
    """Projects flattened patches to the hidden size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch_values = config.in_channels * config.patch_size**2
        self.proj = Projection(patch_values, config.hidden_size, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [N, C*p*p] of any float dtype -> [N, hidden] in the weights' dtype."""
        projected: torch.Tensor = self.proj(pixels.to(self.proj.weight.dtype))
        return projected


class VisionAttention(nn.Module):
    """Full bidirectional attention within each frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Projection(config.hidden_size, 3 * config.hidden_size)
        self.proj = Projection(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, runs: Sequence[Frames], rotation: Rotation) -> torch.Tensor:
        """x [N, hidden] -> [N, hidden]."""
        num_patches, hidden = x.shape
        q, k, v = self.qkv(x).view(num_patches, 3, self.num_heads, -1).unbind(1)
        q, k = rotation.apply(q), rotation.apply(k)
        sizes = [run.num_frames * run.num_patches for run in runs]
        parts = zip(runs, *(torch.split(x, sizes) for x in (q, k, v)), strict=True)
        attended = [self._attend(*part) for part in parts]
        out: torch.Tensor = self.proj(torch.cat(attended).view(num_patches, hidden))
        return out

    def _attend(
        self, run: Frames, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q, k, v [F*S, heads, head_dim] of F frames -> [F*S, hidden], frames as the batch."""
        shape = (run.num_frames, run.num_patches, self.num_heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


class VisionMlp(nn.Module):
    """fc2(quick_gelu(fc1(x))), quick_gelu(x) = x * sigmoid(1.702 x)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Projection(config.hidden_size, config.intermediate_size)
        self.fc2 = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, hidden] -> [N, hidden]."""
        x = self.fc1(x)
        out: torch.Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return out


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(self, x: torch.Tensor, runs: Sequence[Frames], rotation: Rotation) -> torch.Tensor:
        """x [N, hidden] -> [N, hidden]."""
        x = x + self.attn(self.norm1(x), runs, rotation)
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTower(nn.Module):
    """The whole ViT. Parameter names are the checkpoint's names below `vision_model.`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """pixels [N, C*p*p], the patches of all items in order -> features [N, hidden].

        Raises ValueError when the grids do not add up to N or cannot be cut into merge blocks.
        """
        merge_size = self.config.spatial_merge_size
        if sum(grid.num_patches for grid in grids) != len(pixels):
            raise ValueError(f"grids {list(grids)} do not hold {len(pixels)} patches")
        if any(grid.h % merge_size or grid.w % merge_size for grid in grids):
            raise ValueError(f"grids {list(grids)} are no multiples of {merge_size}")
        x = self.patch_embed(pixels)
        runs, turn = frame_runs(grids), rotation(grids, self.config, x.device)
        for block in self.blocks:
            x = block(x, runs, turn)
        features: torch.Tensor = self.ln(x)
        return features
