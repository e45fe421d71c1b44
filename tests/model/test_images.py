"""Images against transformers' default image processor, bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.ernie4_5_vl_moe.image_processing_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessor,
)

from chiasm.errors import InvalidArgument
from chiasm.model.config import ModelConfig
from chiasm.model.geometry import image_grid, num_tokens, smart_resize
from chiasm.model.images import preprocess_image
from chiasm.model.probe import probe_image
from chiasm.model.processing import ProcessingConfig
from chiasm.types import Grid

SIZES = [
    *((640, 480), (56, 56), (28, 28), (61, 60), (130, 90), (777, 113), (113, 777)),
    *((5599, 28), (28, 5600), (2801, 15), (17, 900), (14, 14), (15, 43), (29, 31), (15, 2000)),
    (2500, 2300),
]


def _noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(width * 10007 + height)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _assert_equal(data: bytes, reference: Any, processing: ProcessingConfig) -> None:
    expected = reference.image_processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")
    patches = preprocess_image(data, processing)
    assert list(patches.grid) == expected["image_grid_thw"][0].tolist()
    assert patches.pixels.dtype == torch.float32
    assert torch.equal(patches.pixels, expected["pixel_values"])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_are_those_of_transformers(width, height, png, reference, processing):
    _assert_equal(png(_noise(width, height)), reference, processing)


def test_random_sizes(png, reference, processing):
    draw = random.Random(5)
    for _ in range(40):
        width, height = draw.randint(15, 400), draw.randint(15, 400)
        _assert_equal(png(_noise(width, height)), reference, processing)


def test_smooth_pictures(png, reference, processing):
    for width, height in ((300, 200), (33, 47)):
        rows, columns = np.mgrid[0:height, 0:width]
        pixels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], 2)
        _assert_equal(png(pixels.astype(np.uint8)), reference, processing)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_convert_as_in_transformers(mode, reference, processing):
    if mode == "I;16":
        image = Image.fromarray(_noise(90, 70)[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(_noise(90, 70, 4)).convert("RGBA" if mode == "LA" else "RGB")
        image = Image.fromarray(_noise(90, 70, 4)) if mode == "RGBA" else image.convert(mode)
    assert image.mode == mode
    _assert_equal(_file(image, "JPEG" if mode == "CMYK" else "PNG"), reference, processing)


def test_palette_with_a_transparent_colour_lies_on_white(reference, processing):
    image = Image.fromarray(_noise(64, 64)).quantize(16)
    for kind in ("PNG", "GIF"):
        data = _file(image, kind, transparency=3)
        _assert_equal(data, reference, processing)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
def test_formats(kind, reference, processing):
    _assert_equal(_file(Image.fromarray(_noise(123, 77)), kind), reference, processing)


def test_animations_give_their_first_frame(processing):
    frames = [Image.fromarray(_noise(80, 60 + i)[:60]) for i in range(3)]
    data = _file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    alone = _file(frames[0], "WEBP", lossless=True)
    assert torch.equal(
        preprocess_image(data, processing).pixels, preprocess_image(alone, processing).pixels
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_turns_upright(orientation, kind, processing):
    """As transformers' loaders of image files do, with Pillow's exif_transpose as the judge."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(Image.fromarray(_noise(120, 60)), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = preprocess_image(_file(upright.convert("RGB"), "PNG"), processing)
    patches = preprocess_image(data, processing)
    assert torch.equal(patches.pixels, expected.pixels)
    assert probe_image(data) == upright.size
    assert patches.grid == image_grid(*probe_image(data), processing) == expected.grid


def test_header_alone_gives_the_grid(png, processing, config):
    for width, height in SIZES:
        data = png(_noise(width, height))
        grid = image_grid(*probe_image(data[:64]), processing)
        assert grid == preprocess_image(data, processing).grid
        assert num_tokens(grid, config.vision) == grid.h * grid.w // 4


def test_declared_size_is_refused_before_decoding(png, processing):
    data = png(_noise(100, 50))
    assert probe_image(data, max_pixels=5000) == (100, 50)
    for refuse in (probe_image, lambda d, **k: preprocess_image(d, processing, **k)):
        with pytest.raises(InvalidArgument, match=r"100 x 50 .* 4999") as error:
            refuse(data[:64], max_pixels=4999)
        assert error.value.field == "image"


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + b"\0\0\0\0IDAT"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_500), (30_000, 20_000), (65_535, 9)])
def test_no_other_bound_on_pixels_than_the_one_given(width: int, height: int) -> None:
    """Pillow has one of its own, beyond which it warns or refuses."""
    data = _png_header(width, height)
    assert probe_image(data, max_pixels=width * height) == (width, height)


@pytest.mark.parametrize(("width", "height"), [(100_000_000, 1), (1, 65_536)])
def test_a_side_is_bounded_too(width: int, height: int, processing: ProcessingConfig) -> None:
    """Resizing a row of so many pixels would take gigabytes."""
    for refuse in (probe_image, lambda d: preprocess_image(d, processing)):
        with pytest.raises(InvalidArgument, match="limit 65535 a side") as error:
            refuse(_png_header(width, height))
        assert error.value.field == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_refused(kind, processing):
    data = _file(Image.fromarray(_noise(200, 100)), kind)
    for broken in (data[: len(data) // 2], data[:10], b"", b"GIF89a", b"nonsense" * 99):
        with pytest.raises(InvalidArgument) as error:
            preprocess_image(broken, processing)
        assert error.value.field == "image"


def test_other_formats_are_refused():
    image = Image.fromarray(_noise(64, 64))
    for kind in ("TIFF", "PPM", "ICO", "TGA", "PDF"):
        with pytest.raises(InvalidArgument, match="not a readable"):
            probe_image(_file(image, kind))


def test_random_damage_never_raises_anything_else(processing):
    draw = random.Random(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = bytearray(_file(Image.fromarray(_noise(40, 30)), kind))
        for _ in range(40):
            broken = bytearray(data)
            for _ in range(draw.randint(1, 8)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            with contextlib.suppress(InvalidArgument):
                preprocess_image(bytes(broken), processing, max_pixels=10_000)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1000, (28, 5600)),  # the ratio is clamped to 200; transformers raises
        (1000, 2, (5600, 28)),
        (10, 500, (28, 504)),  # transformers lets a side become zero first
        (42, 70, (56, 56)),  # halves round to even
        (56, 56, (56, 56)),
        (20000, 20000, (2184, 2184)),
        (5, 5, (56, 56)),
    ],
)
def test_smart_resize_keeps_the_original_guards(height, width, expected, processing):
    assert smart_resize(height, width, factor=28, pixels=processing.image) == expected


def test_the_limits_are_those_that_transformers_goes_by(tmp_path: Path, config: ModelConfig):
    """The published file has min_pixels and max_pixels, which nobody reads."""
    hub_file = {"min_pixels": 5000, "max_pixels": 4816896, "image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub_file))
    hub = ProcessingConfig.load(tmp_path, config)
    assert hub.image.mean == (0.5, 0.5, 0.5)
    size = Ernie4_5_VLMoeImageProcessor(**hub_file).size
    assert (hub.image.min_pixels, hub.image.max_pixels) == (size.shortest_edge, size.longest_edge)
    assert image_grid(4000, 3000, hub) == Grid(1, 136, 180)  # what it makes of such a picture
    assert (hub.video.pixels.min_pixels, hub.video.pixels.max_pixels) == (299 * 784, 1196 * 784)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": {"shortest_edge": 4000, "longest_edge": 90000}}})
    )
    nested = ProcessingConfig.load(tmp_path, config)
    assert (nested.image.min_pixels, nested.image.max_pixels) == (4000, 90000)


def test_defaults_without_files(tmp_path: Path, config: ModelConfig):
    settings = ProcessingConfig.load(tmp_path, config)
    assert (settings.image.min_pixels, settings.image.max_pixels) == (3136, 28 * 28 * 6177)
    assert (settings.factor, settings.video.draw_timestamps) == (28, True)
    assert (settings.video.fps, settings.video.min_frames, settings.video.max_frames) == (
        None,
        16,
        180,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_normalize", False),
        ("resample", 2),
        ("patch_size", 16),
        ("image_mean", [0.5]),
        ("image_std", [1.0, 0.0, 1.0]),
        ("size", {"longest_edge": "many"}),
        ("size", {"longest_edge": 100}),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(key, value, tmp_path, config):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(InvalidArgument, match=r"preprocessor_config\.json"):
        ProcessingConfig.load(tmp_path, config)


def test_other_limits_give_other_grids(png, reference, processing, checkpoint, tmp_path, config):
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    size = {"shortest_edge": 28 * 28 * 9, "longest_edge": 28 * 28 * 25}
    settings["image_processor"] |= {"size": size, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    changed = ProcessingConfig.load(tmp_path, config)
    for width, height in ((400, 300), (30, 40), (120, 120)):
        data = png(_noise(width, height))
        expected = reference.image_processor(
            images=[Image.open(io.BytesIO(data))],
            size=size,
            image_mean=[0.1, 0.2, 0.3],
            return_tensors="pt",
        )
        assert torch.equal(preprocess_image(data, changed).pixels, expected["pixel_values"])
