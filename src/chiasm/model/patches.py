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


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPatches:
    """Patches before normalisation, in a quarter of the memory. Normalised part by part, the values
    are those of the whole."""

    levels: Tensor
    """[N, C, patch * patch] uint8, ordered as `Patches.pixels`."""
    grid: Grid
    settings: PixelSettings

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Rows [start, stop) as `Patches.pixels` has them, on `device` if one is given."""
        levels = self.levels[start:stop]
        return normalize(levels if device is None else levels.to(device), self.settings)

    def normalized(self) -> Patches:
        """All of them."""
        return Patches(pixels=self.rows(0, len(self.levels)), grid=self.grid)


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
    mean = (torch.tensor(settings.mean) * scale)[:, None].to(patches.device)
    std = (torch.tensor(settings.std) * scale)[:, None].to(patches.device)
    return patches.to(torch.float32).sub_(mean).div_(std).flatten(1)
