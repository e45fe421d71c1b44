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
from chiasm.model.boxes import check_boxes, is_boxed

MAX_IMAGE_PIXELS = 100_000_000
MAX_VIDEO_PIXELS = 36_000_000
"""Of one frame, a little above 8K: decoders hold many frames at a time."""

MAX_SIDE = 65_535
"""Of a picture, as of JPEG: resizing takes memory by the side, not by the pixels alone."""

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

_MARGINS = 256 * 256

# Demuxers that read the bytes at hand. Others (hls, dash, concat, ...) open whatever file or
# address a playlist names.
_BOXED = "mov,mp4"
_CONTAINERS = "matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"

# Codecs whose size MP4 leaves to the decoder; none has frames above 8191 x 8191.
_SIZED_BY_DECODERS = "mpeg4,h263,h261"

# Pillow's own bound would warn of images that check_size lets pass, and refuse some of them.
Image.MAX_IMAGE_PIXELS = None


Source = bytes | BinaryIO
"""A media file: its bytes, or an open file, which is read from its beginning and left open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLimits:
    """What a video may cost."""

    max_pixels: int = MAX_VIDEO_PIXELS
    """Most pixels of one frame."""
    max_frames: int = 108_000
    """Most frames in the file; the default is an hour at 30 per second."""
    max_decoded_pixels: int = 100_000_000_000
    """Most pixels of all frames together; the default is such an hour in 1280 x 720."""

    @classmethod
    def beside_images(cls, max_image_pixels: int) -> VideoLimits:
        """Of who takes images of so many pixels: a frame has no more, and never more than
        MAX_VIDEO_PIXELS."""
        return cls(max_pixels=min(max_image_pixels, MAX_VIDEO_PIXELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a container says of its video stream."""

    width: int
    """As stored: a container may want its frames turned, which only they tell."""
    height: int
    num_frames: int | None
    """None where the container does not tell."""
    fps: float | None


def check_size(field: str, width: int, height: int, max_pixels: int) -> None:
    """Raises InvalidArgument(field) for an empty picture, and for one above `max_pixels` or with a
    side above MAX_SIDE."""
    if width < 1 or height < 1:  # FFmpeg clears a size it refuses
        raise InvalidArgument(field, f"declares no size, or one far above {max_pixels} pixels")
    if width * height > max_pixels:
        raise InvalidArgument(
            field, f"declares {width} x {height} pixels, limit {max_pixels} in all"
        )
    if max(width, height) > MAX_SIDE:
        raise InvalidArgument(field, f"declares {width} x {height} pixels, limit {MAX_SIDE} a side")


def check_length(num_frames: int, num_pixels: int, limits: VideoLimits) -> None:
    """Raises InvalidArgument("video") for too many frames, or too many pixels in all of them."""
    if num_frames > limits.max_frames:
        raise InvalidArgument("video", f"has more than {limits.max_frames} frames")
    if num_pixels > limits.max_decoded_pixels:
        raise InvalidArgument(
            "video", f"has more than {limits.max_decoded_pixels} pixels in all frames"
        )


def open_image(source: Source, *, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not.

    Raises InvalidArgument("image") for an unknown format, a damaged header or a declared size above
    `max_pixels`.
    """
    try:
        image = Image.open(_opened(source), formats=_IMAGE_FORMATS)
    except Exception:  # on damaged headers Pillow raises almost anything
        raise InvalidArgument(
            "image", f"is not a readable {', '.join(_IMAGE_FORMATS)} file"
        ) from None
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
    file without video stream, one without decoder, and declared sizes above `limits`.
    """
    # Holds for every frame a decoder makes room for, whatever the header says. Room has margins, so
    # this bound is loose: check_size is the exact one.
    bound = {"max_pixels": str(2 * limits.max_pixels + _MARGINS)}
    file = _opened(source)
    has_boxes = is_boxed(file)
    if has_boxes:
        check_boxes(file)
    file.seek(0)
    options = {
        "format_whitelist": _BOXED if has_boxes else _CONTAINERS,
        "protocol_whitelist": "none",
        # Opening would decode first frames of any codec and size: no bound reaches the decoders of
        # streams that are only found on the way.
        "codec_whitelist": _SIZED_BY_DECODERS,
        **bound,
    }
    try:
        with av.open(file, options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise InvalidArgument("video", "has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InvalidArgument("video", "is of a codec that has no decoder here")
            check_size("video", stream.width, stream.height, limits.max_pixels)
            check_length(stream.frames, stream.frames * stream.width * stream.height, limits)
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
