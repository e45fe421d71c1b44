"""From a picture's width and height to its grid of patches and its number of tokens. No torch."""

from __future__ import annotations

import math

from chiasm.model.config import VisionConfig
from chiasm.model.processing import PixelSettings, ProcessingConfig, VideoSettings
from chiasm.types import Grid

MAX_ASPECT_RATIO = 200
DEFAULT_FPS = 24.0
"""Pace of a video whose container names none."""


def smart_resize(height: int, width: int, *, factor: int, pixels: PixelSettings) -> tuple[int, int]:
    """Height and width after resizing: multiples of `factor`, within the bounds of `pixels` and as
    close to the original shape as that allows.

    Formula and guards are those of ERNIE's original processor: an aspect ratio above 200 is clamped
    (transformers raises), a side is at least `factor` (transformers lets a side under half of it
    round to zero first). For all other sizes both agree. Rounding is half to even.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        short = _round(min(height, width), factor)
        long = short * MAX_ASPECT_RATIO
        height, width = (long, short) if height > width else (short, long)
    new_height, new_width = _round(height, factor), _round(width, factor)
    if new_height * new_width > pixels.max_pixels:
        scale = math.sqrt(height * width / pixels.max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < pixels.min_pixels:
        scale = math.sqrt(pixels.min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def image_grid(width: int, height: int, processing: ProcessingConfig) -> Grid:
    """The grid of an image, known from its header."""
    return _grid(1, width, height, processing, processing.image)


def video_grid(
    num_frames: int | None, fps: float | None, width: int, height: int, processing: ProcessingConfig
) -> Grid:
    """The grid of a video as its container describes it.

    Exact where the container tells the number of frames and keeps its word, else (None) the
    largest it can become.
    """
    video = processing.video
    taken = (
        video.max_frames
        if num_frames is None
        else math.ceil(num_sampled_frames(num_frames, fps, video))
    )
    merge = processing.temporal_merge_size
    return _grid(-(-taken // merge) * merge, width, height, processing, video.pixels)


def num_sampled_frames(num_frames: int, fps: float | None, video: VideoSettings) -> float:
    """How many of a video's frames are taken; a fraction where fps asks for one, as transformers
    keeps it to space the frames."""
    if not video.do_sample_frames:
        return num_frames
    if video.num_frames is not None:
        return min(video.num_frames, num_frames)
    wanted = num_frames / (fps or DEFAULT_FPS) * video.fps if video.fps else num_frames
    return min(max(wanted, video.min_frames), video.max_frames, num_frames)


def num_tokens(grid: Grid, vision: VisionConfig) -> int:
    """Embeddings an item yields, which is the number of its placeholders.

    One per block of spatial_merge_size^2 patches; the frames of a video are merged by
    temporal_merge_size, the one frame of an image is not.
    """
    merge = vision.spatial_merge_size
    frames = 1 if grid.t == 1 else grid.t // vision.temporal_merge_size
    return frames * (grid.h // merge) * (grid.w // merge)


def _round(length: int, factor: int) -> int:
    return max(factor, round(length / factor) * factor)


def _grid(
    frames: int, width: int, height: int, processing: ProcessingConfig, pixels: PixelSettings
) -> Grid:
    rows, columns = smart_resize(height, width, factor=processing.factor, pixels=pixels)
    return Grid(frames, rows // processing.patch_size, columns // processing.patch_size)
