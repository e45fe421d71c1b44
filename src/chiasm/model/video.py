"""Video files to patches, as transformers' Ernie4_5_VLMoeVideoProcessor prepares decoded frames.

Which frames to take is decided before any is decoded; then frames pass one at a time through
stamping, resizing and patching, so memory holds one full frame and the patches of those taken, a
byte a value, however long the video is. Frames are counted and decoded in presentation order, and
turned as the container asks, by whole quarters: so does torchcodec, transformers' default reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from chiasm.errors import InvalidArgument
from chiasm.model.geometry import DEFAULT_FPS, num_sampled_frames, smart_resize
from chiasm.model.patches import Patches, RawPatches, patchify, resize
from chiasm.model.probe import (
    Source,
    VideoLimits,
    check_length,
    check_size,
    open_video,
    probe_video,
)
from chiasm.model.processing import ProcessingConfig, VideoSettings
from chiasm.types import Grid

_STAMP_SIZE = 0.1
"""Height of a timestamp over the frame's shorter side; also its outline over that height."""


def preprocess_video(
    source: Source, processing: ProcessingConfig, *, limits: VideoLimits | None = None
) -> Patches:
    """What `read_video` reads, normalised."""
    return read_video(source, processing, limits=limits).normalized()


def read_video(
    source: Source,
    processing: ProcessingConfig,
    *,
    limits: VideoLimits | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> RawPatches:
    """Samples, stamps, resizes and patches a video; an odd last frame is doubled.

    on_frame: called for every frame decoded, wanted or not; what it raises ends the reading.

    Raises InvalidArgument("video") for what cannot be decoded, has no frame, exceeds `limits`, or
    has more than max_frames frames where the checkpoint does not sample.
    """
    limits = limits or VideoLimits()
    info = probe_video(source, limits)
    total = info.num_frames or _count_frames(source, limits, on_frame)
    try:
        return _sampled(source, total, info.fps, processing, limits, on_frame)
    except _FewerFrames as found:  # as of a film that was cut: its header counts what it lost
        return _sampled(source, found.count, info.fps, processing, limits, on_frame)


def _sampled(
    source: Source,
    total: int,
    fps: float | None,
    processing: ProcessingConfig,
    limits: VideoLimits,
    on_frame: Callable[[], None],
) -> RawPatches:
    indices = sample_indices(total, fps, processing.video)
    times = _timestamps(indices, fps, processing.video)
    rows: torch.Tensor | None = None
    grid, taken = Grid(0, 0, 0), 0
    for frame in _frames(source, indices, limits, on_frame):
        if rows is None:
            grid = _frame_grid(frame, processing)
            rows = _allocate(len(indices), grid, processing)
        stamp = times[taken] if processing.video.draw_timestamps else None
        rows[taken] = _prepare(frame, stamp, grid, processing)
        taken += 1
    assert rows is not None
    return _merged(rows, taken, grid, processing)


class _FewerFrames(Exception):
    """There are fewer frames than the container tells."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


def sample_indices(num_frames: int, fps: float | None, video: VideoSettings) -> list[int]:
    """Indices of the frames to take, ascending: evenly spaced from the first one on."""
    if not video.do_sample_frames and num_frames > video.max_frames:
        raise InvalidArgument("video", f"has {num_frames} frames, limit {video.max_frames}")
    step = num_frames / num_sampled_frames(num_frames, fps, video)
    # torch.arange rounds in its own way; the reference's indices come from it.
    indices = torch.arange(0, num_frames, step).int().tolist()
    return [index for index in indices if index < num_frames]


def timestamp_text(seconds: float | torch.Tensor) -> str:
    """`time: HH:MM:SS.ss`."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"time: {hours:02d}:{minutes:02d}:{seconds % 3600 % 60:05.2f}"


def _timestamps(
    indices: Sequence[int], fps: float | None, video: VideoSettings
) -> Sequence[float | torch.Tensor]:
    pace = fps or DEFAULT_FPS
    if not video.do_sample_frames:
        return [index / pace for index in indices]
    # Sampled indices are int32 tensors in the reference, so their seconds are float32 there.
    return list(torch.tensor(indices, dtype=torch.int32) / pace)


def _count_frames(source: Source, limits: VideoLimits, on_frame: Callable[[], None]) -> int:
    """For containers that do not tell. Decodes: packets and frames are not one to one."""
    count = 0
    with open_video(source, limits) as (container, stream):
        for _ in _decoded(container, stream, limits, on_frame):
            count += 1
    if not count:
        raise InvalidArgument("video", "has no frame that can be decoded")
    return count


def _frames(
    source: Source, indices: Sequence[int], limits: VideoLimits, on_frame: Callable[[], None]
) -> Iterator[np.ndarray]:
    """The frames at `indices`, [H, W, 3] uint8, all of one size. Raises _FewerFrames."""
    wanted, last, count = set(indices), indices[-1], 0
    size: tuple[int, int] | None = None
    with open_video(source, limits) as (container, stream):
        for index, frame in enumerate(_decoded(container, stream, limits, on_frame)):
            if index in wanted:
                pixels = _pixels(frame, index, limits)
                size = size or pixels.shape[:2]
                if pixels.shape[:2] != size:
                    raise InvalidArgument("video", f"frame {index} differs in size from the first")
                yield pixels
            if index == last:
                return
            count = index + 1
    if not count:
        raise InvalidArgument("video", "has no frame that can be decoded")
    raise _FewerFrames(count)


def _decoded(
    container: Any, stream: Any, limits: VideoLimits, on_frame: Callable[[], None]
) -> Iterator[Any]:
    """All frames, as long as they keep to `limits`: headers may tell less than comes."""
    num_pixels = 0
    for index, frame in enumerate(container.decode(stream)):
        on_frame()
        num_pixels += frame.width * frame.height
        check_length(index + 1, num_pixels, limits)
        yield frame


def _pixels(frame: Any, index: int, limits: VideoLimits) -> np.ndarray:
    """[H, W, 3] uint8, turned as the container asks."""
    if frame.is_corrupt:
        raise InvalidArgument("video", f"frame {index} is damaged")
    check_size("video", frame.width, frame.height, limits.max_pixels)
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _frame_grid(frame: np.ndarray, processing: ProcessingConfig) -> Grid:
    height, width = smart_resize(
        *frame.shape[:2], factor=processing.factor, pixels=processing.video.pixels
    )
    return Grid(1, height // processing.patch_size, width // processing.patch_size)


def _allocate(num_frames: int, grid: Grid, processing: ProcessingConfig) -> torch.Tensor:
    """[frames + 1, patches, 3, patch * patch]; the last frame leaves room to double one."""
    shape = (num_frames + 1, grid.num_patches, 3, processing.patch_size**2)
    return torch.empty(shape, dtype=torch.uint8)


def _prepare(
    frame: np.ndarray,
    seconds: float | torch.Tensor | None,
    grid: Grid,
    processing: ProcessingConfig,
) -> torch.Tensor:
    """One frame to uint8 [patches, 3, patch * patch]."""
    if seconds is not None:
        frame = _stamp(frame, timestamp_text(seconds), processing.video)
    patch_size = processing.patch_size
    image = torch.from_numpy(frame).permute(2, 0, 1).contiguous()
    image = resize(image, grid.h * patch_size, grid.w * patch_size)
    return patchify(image, patch_size=patch_size, merge_size=processing.spatial_merge_size)


def _stamp(frame: np.ndarray, text: str, video: VideoSettings) -> np.ndarray:
    """Black on a white outline, in the upper left corner, before the frame is resized."""
    image = Image.fromarray(frame)
    height = int(min(image.size) * _STAMP_SIZE)
    if height < 1:  # nothing legible fits
        return frame
    ImageDraw.Draw(image).text(
        (0, 0),
        text,
        font=ImageFont.truetype(str(video.font), height),
        fill=(0, 0, 0),
        stroke_width=int(height * _STAMP_SIZE),
        stroke_fill=(255, 255, 255),
    )
    return np.array(image)


def _merged(rows: torch.Tensor, taken: int, grid: Grid, processing: ProcessingConfig) -> RawPatches:
    """Frames in whole groups of temporal_merge_size (2): a missing last one is a copy."""
    if taken % processing.temporal_merge_size:
        rows[taken] = rows[taken - 1]
        taken += 1
    return RawPatches(
        levels=rows[:taken].flatten(0, 1),
        grid=Grid(taken, grid.h, grid.w),
        settings=processing.video.pixels,
    )
