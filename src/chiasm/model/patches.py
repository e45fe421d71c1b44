"""Pixels to rows of patches, bit for bit as the torchvision backend of transformers makes them.

That backend resizes uint8 with torch's own antialiased bicubic `interpolate` and folds the rescale
factor into mean and std; both are done here without torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chiasm.model.processing import PixelSettings
from chiasm.types import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Input of the ViT."""

    pixels: Tensor
    """[N, C * patch * patch] float32: frames outermost, then merge blocks, then the patches of a
    block, each row channel by channel."""
    grid: Grid


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """[C, H, W] uint8 to [C, height, width] uint8, bicubic with antialiasing."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(
        image[None], (height, width), mode="bicubic", align_corners=False, antialias=True
    )[0]


def patchify(image: Tensor, *, patch_size: int, merge_size: int) -> Tensor:
    """[C, H, W] to [N, C, patch * patch], the patches of a merge block one after the other."""
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    blocks = image.view(
        channels, rows // merge_size, merge_size, patch_size, -1, merge_size, patch_size
    )
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)
    return blocks.reshape(rows * columns, channels, patch_size * patch_size)


def normalize(patches: Tensor, settings: PixelSettings) -> Tensor:
    """[N, C, P] uint8 to [N, C * P] float32."""
    # Multiplying first and subtracting after would round differently from the reference.
    scale = 1.0 / settings.rescale_factor
    mean = (torch.tensor(settings.mean) * scale)[:, None]
    std = (torch.tensor(settings.std) * scale)[:, None]
    return patches.to(torch.float32).sub_(mean).div_(std).flatten(1)
