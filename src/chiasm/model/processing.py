"""How a checkpoint wants its images and videos prepared. No torch.

Read are `processor_config.json`, as transformers 5 saves it (one object per processor),
`video_preprocessor_config.json` and `preprocessor_config.json`, the last also in the hub's own flat
shape (`video_fps`, `video_min_pixels`, ...). What no file states is the published default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import font_roboto

from chiasm.model.config import ModelConfig
from chiasm.model.section import Section

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKEN_PIXELS = 28 * 28
_BICUBIC = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSettings:
    """Bounds of the resized picture and the normalisation (x * rescale_factor - mean) / std."""

    min_pixels: int
    max_pixels: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """Which frames of a video are taken, and how each is prepared."""

    pixels: PixelSettings
    """Bounds per frame."""
    do_sample_frames: bool
    """False takes every frame, and refuses videos of more than max_frames."""
    fps: float | None
    """Frames to take per second; None takes as many as max_frames allows."""
    num_frames: int | None
    """Frames to take of every video; excludes fps."""
    min_frames: int
    max_frames: int
    draw_timestamps: bool
    """Write its time into the corner of each frame."""
    font: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessingConfig:
    """From bytes to patches."""

    patch_size: int
    spatial_merge_size: int
    temporal_merge_size: int
    image: PixelSettings
    video: VideoSettings

    @property
    def factor(self) -> int:
        """Sides of a resized picture are multiples of this, the side of one token."""
        return self.patch_size * self.spatial_merge_size

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> ProcessingConfig:
        """Reads the directory's files. Raises InvalidArgument with the file and key that is wrong
        or asks for what is not supported."""
        processor = Section.load_optional(directory / "processor_config.json")
        flat = Section.load_optional(directory / "preprocessor_config.json")
        video_file = Section.load_optional(directory / "video_preprocessor_config.json")
        # Keys such as video_fps are the original processor's; it looks for them in both files.
        hub = Section(flat.path, {**flat.values, **processor.values})
        image = processor.section("image_processor") if processor.has("image_processor") else flat
        video = (
            processor.section("video_processor") if processor.has("video_processor") else video_file
        )
        _check(image, config)
        _check(video, config)
        video.require("temporal_patch_size", config.vision.temporal_merge_size)
        return cls(
            patch_size=config.vision.patch_size,
            spatial_merge_size=config.vision.spatial_merge_size,
            temporal_merge_size=config.vision.temporal_merge_size,
            image=_pixels(image, hub, "image", 4, 6177),
            video=_video(directory, video, hub),
        )


def _check(section: Section, config: ModelConfig) -> None:
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        section.require(key, True)
    section.require("resample", _BICUBIC)
    section.require("patch_size", config.vision.patch_size)
    section.require("merge_size", config.vision.spatial_merge_size)


def _pixels(
    section: Section, hub: Section, kind: str, min_tokens: int, max_tokens: int
) -> PixelSettings:
    # As transformers does it, whatever `min_pixels` and `max_pixels` beside it say: the published
    # preprocessor_config.json has some, and the original processor passes them over as well.
    size = section.section("size")
    low = hub.integer(f"{kind}_min_pixels", min_tokens * _TOKEN_PIXELS)
    high = hub.integer(f"{kind}_max_pixels", max_tokens * _TOKEN_PIXELS)
    settings = PixelSettings(
        min_pixels=size.integer("shortest_edge", low),
        max_pixels=size.integer("longest_edge", high),
        rescale_factor=section.number("rescale_factor", 1 / 255),
        mean=_channels(section, "image_mean", _CLIP_MEAN),
        std=_channels(section, "image_std", _CLIP_STD),
    )
    if settings.min_pixels > settings.max_pixels:
        raise section.error(
            "size", f"min_pixels {settings.min_pixels} exceeds max_pixels {settings.max_pixels}"
        )
    if min(settings.std) <= 0:
        raise section.error("image_std", f"must be above zero, not {settings.std}")
    return settings


def _channels(
    section: Section, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    values = section.values[key] if section.has(key) else list(default)
    if not (
        isinstance(values, list)
        and len(values) == 3
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    ):
        raise section.error(key, f"must hold three finite numbers, not {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


def _video(directory: Path, video: Section, hub: Section) -> VideoSettings:
    fps = video.number("fps") if video.has("fps") else None
    num_frames = video.integer("num_frames") if video.has("num_frames") else None
    if fps is None and hub.has("video_fps"):
        fps = hub.number("video_fps")
    if num_frames is None and hub.integer("video_target_frames", -1, low=-1) > 0:
        # The original processor samples by fps only where no frame number is set.
        num_frames, fps = hub.integer("video_target_frames"), None
    if fps is not None and num_frames is not None:
        raise video.error("num_frames", "excludes fps")
    settings = VideoSettings(
        pixels=_pixels(video, hub, "video", 299, 1196),
        do_sample_frames=video.boolean("do_sample_frames", True),
        fps=fps,
        num_frames=num_frames,
        min_frames=video.integer("min_frames", hub.integer("video_min_frames", 16)),
        max_frames=video.integer("max_frames", hub.integer("video_max_frames", 180)),
        draw_timestamps=video.boolean("draw_on_frames", True),
        font=_font(directory, video),
    )
    if settings.min_frames > settings.max_frames:
        raise video.error("min_frames", f"exceeds max_frames, {settings.max_frames}")
    if num_frames is not None and not settings.min_frames <= num_frames <= settings.max_frames:
        raise video.error("num_frames", f"must lie in {settings.min_frames}..{settings.max_frames}")
    return settings


def _font(directory: Path, video: Section) -> Path:
    """The checkpoint's own copy of the font where it has one."""
    name = str(video.values.get("font") or "Roboto-Regular.ttf")
    if Path(name).name == name and (directory / name).is_file():
        return directory / name
    return Path(font_roboto.font_files["Roboto"])
