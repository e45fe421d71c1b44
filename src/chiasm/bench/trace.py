"""Recorded workloads: one JSON object a line.

{"timestamp": 12.5, "prompt_tokens": 830, "output_tokens": 64, "images": [[896, 672]]}

`timestamp` is in seconds from any origin, `images` a list of [width, height], a number of images of
the default size, or absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from chiasm.bench.lengths import MAX_TOKENS
from chiasm.bench.workload import Size, TraceRow

MAX_ROWS = 500_000
MAX_LINE_CHARS = 1 << 16
MAX_IMAGE_SIDE = 8192
MAX_IMAGES = 64


def read(path: Path, default_size: Size) -> list[TraceRow]:
    """All rows, in the order of time. Raises ValueError with the line at fault, and OSError."""
    rows: list[TraceRow] = []
    with path.open(encoding="utf-8") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARS + 1):
            number += 1
            if len(line) > MAX_LINE_CHARS:
                raise ValueError(f"line {number} is longer than {MAX_LINE_CHARS} characters")
            if not line.strip():
                continue
            if len(rows) == MAX_ROWS:
                raise ValueError(f"has more than {MAX_ROWS} rows")
            try:
                rows.append(_row(line, default_size))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not rows:
        raise ValueError("has no rows")
    return sorted(rows, key=lambda row: row.timestamp)


def _row(line: str, default_size: Size) -> TraceRow:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(entry, dict):
        raise ValueError("is not a JSON object")
    timestamp = entry.get("timestamp")
    if not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
        raise ValueError("timestamp is not a number")
    return TraceRow(
        float(timestamp),
        _integer(entry, "prompt_tokens", MAX_TOKENS),
        _integer(entry, "output_tokens", MAX_TOKENS),
        _images(entry.get("images", 0), default_size),
    )


def _integer(entry: Mapping[str, object], name: str, most: int) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is not an integer in 1..{most}")
    return value


def _images(value: object, default_size: Size) -> tuple[Size, ...]:
    if isinstance(value, int) and 0 <= value <= MAX_IMAGES:
        return (default_size,) * value
    if not isinstance(value, list) or len(value) > MAX_IMAGES:
        raise ValueError(f"images is neither a number up to {MAX_IMAGES} nor a list of sizes")
    return tuple(_size(item) for item in value)


def _size(item: object) -> Size:
    match item:
        case [int(width), int(height)] if (
            1 <= width <= MAX_IMAGE_SIDE and 1 <= height <= MAX_IMAGE_SIDE
        ):
            return Size(width, height)
    raise ValueError(f"an image size is not [width, height] in 1..{MAX_IMAGE_SIDE}")
