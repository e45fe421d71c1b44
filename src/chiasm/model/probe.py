"""Media files opened, and judged by their headers before anything is decoded. No torch.

Decoders get untrusted bytes: only the listed formats are tried, and what a header declares is
checked first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
from PIL import Image

from chiasm.errors import InvalidArgument

MAX_IMAGE_PIXELS = 100_000_000

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

_MARGINS = 256 * 256

# Demuxers that read the bytes at hand. Others (hls, dash, concat, ...) open whatever file or
# address a playlist names.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"


Source = bytes | BinaryIO
"""A media file: its bytes, or an open file, which is read from its beginning and left open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLimits:
    """What a video may cost."""

    max_pixels: int = MAX_IMAGE_PIXELS
    """Most pixels of one frame."""
    max_frames: int = 108_000
    """Most frames in the file; the default is an hour at 30 per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a container says of its video stream."""

    width: int
    height: int
    num_frames: int | None
    """None where the container does not tell."""
    fps: float | None


def check_size(field: str, width: int, height: int, max_pixels: int) -> None:
    """Raises InvalidArgument(field) for an empty picture and for one above `max_pixels`."""
    if width < 1 or height < 1:  # FFmpeg clears a size it refuses
        raise InvalidArgument(field, f"declares no size, or one far above {max_pixels} pixels")
    if width * height > max_pixels:
        raise InvalidArgument(
            field, f"declares {width} x {height} pixels, limit {max_pixels} in all"
        )


def open_image(source: Source, *, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not.

    Raises InvalidArgument("image") for an unknown format, a damaged header or a declared size above
    `max_pixels`.
    """
    try:
        image = Image.open(_opened(source), formats=_IMAGE_FORMATS)
    except Exception as error:  # on damaged headers Pillow raises almost anything
        raise _not_an_image(error) from None
    check_size("image", image.width, image.height, max_pixels)
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none that makes sense."""
    try:
        # Not image.getexif(): the one of PNG decodes the pixels to look behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except Exception:  # a damaged EXIF block does not make the pixels worse
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def probe_image(source: Source, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Width and height of the upright image, from the header alone. Raises as `open_image`."""
    image = open_image(source, max_pixels=max_pixels)
    width, height = image.size
    return (height, width) if orientation(image) in _SIDEWAYS else (width, height)


@contextmanager
def open_video(source: Source, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, ready to decode.

    Whatever FFmpeg finds wrong within the block is raised as InvalidArgument("video"); so are a
    file without video stream and declared sizes above `limits`.
    """
    # Holds for every frame the decoder makes room for, whatever the header says; opening decodes
    # some, too. Room has margins, so this bound is loose: check_size is the exact one.
    bound = {"max_pixels": str(2 * limits.max_pixels + _MARGINS)}
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none", **bound}
    try:
        with av.open(_opened(source), options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise InvalidArgument("video", "has no video stream")
            stream = container.streams.video[0]
            check_size("video", stream.width, stream.height, limits.max_pixels)
            if stream.frames > limits.max_frames:
                raise InvalidArgument(
                    "video", f"has {stream.frames} frames, limit {limits.max_frames}"
                )
            stream.codec_context.options = bound
            yield container, stream
    except (av.FFmpegError, ValueError) as error:
        raise InvalidArgument("video", f"cannot be decoded: {error}") from None


def probe_video(source: Source, limits: VideoLimits) -> VideoInfo:
    """What the container declares. Raises as `open_video`."""
    with open_video(source, limits) as (_, stream):
        return VideoInfo(
            width=stream.width,
            height=stream.height,
            num_frames=stream.frames or None,
            fps=float(stream.average_rate) if stream.average_rate else None,
        )


def _opened(source: Source) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    source.seek(0)
    return source


def _not_an_image(error: Exception) -> InvalidArgument:
    if isinstance(error, Image.DecompressionBombError):
        return InvalidArgument("image", str(error))
    return InvalidArgument("image", f"is not a readable {', '.join(_IMAGE_FORMATS)} file")
