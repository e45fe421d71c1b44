"""Image files to patches.

The judge is transformers' Ernie4_5_VLMoeImageProcessor, which takes its torchvision backend by
default: equal bit for bit. Its PIL backend resizes in other arithmetic: photographs differ by at
most one grey level in under a hundredth of the values, pure noise by up to some twenty.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from chiasm.errors import InvalidArgument
from chiasm.model.geometry import image_grid
from chiasm.model.patches import Patches, RawPatches, patchify, resize
from chiasm.model.probe import MAX_IMAGE_PIXELS, Source, open_image, orientation
from chiasm.model.processing import ProcessingConfig

__all__ = ["Patches", "preprocess_image", "read_image"]

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def preprocess_image(
    source: Source, processing: ProcessingConfig, *, max_pixels: int = MAX_IMAGE_PIXELS
) -> Patches:
    """What `read_image` reads, normalised."""
    return read_image(source, processing, max_pixels=max_pixels).normalized()


def read_image(
    source: Source, processing: ProcessingConfig, *, max_pixels: int = MAX_IMAGE_PIXELS
) -> RawPatches:
    """Decodes, turns upright, resizes and patches one image (of an animation, its first frame).

    Raises InvalidArgument("image") for what is no JPEG, PNG, WebP, GIF or BMP, is damaged or cut
    short, or declares more than `max_pixels`.
    """
    rgb = _decode(source, max_pixels)
    height, width, _ = rgb.shape
    grid = image_grid(width, height, processing)
    patch_size = processing.patch_size
    image = torch.from_numpy(rgb).permute(2, 0, 1).contiguous()
    image = resize(image, grid.h * patch_size, grid.w * patch_size)
    rows = patchify(image, patch_size=patch_size, merge_size=processing.spatial_merge_size)
    return RawPatches(levels=rows, grid=grid, settings=processing.image)


def _decode(source: Source, max_pixels: int) -> np.ndarray:
    """[H, W, 3] uint8, upright as transformers' own file loaders turn it."""
    image = open_image(source, max_pixels=max_pixels)
    turn = _TO_UPRIGHT.get(orientation(image))
    try:
        rgb = _to_rgb(image)
    except Exception as error:  # on damaged files Pillow raises almost anything
        raise InvalidArgument("image", f"cannot be decoded: {error}") from None
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparency is laid on white; other modes convert as Pillow converts them."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")
