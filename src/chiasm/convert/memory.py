"""Whether whole models fit into memory, as calibration and quality hold them."""

from __future__ import annotations

from pathlib import Path

import torch

from chiasm.convert.plan import Plan
from chiasm.errors import ResourceExhausted
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.shapes import Shape
from chiasm.model.stream import DTYPES, tensor_bytes

_MEMINFO = Path("/proc/meminfo")


def source_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Weights of WholeModel(plan.source, dtype), from the files' headers."""
    with Checkpoint(plan.source, plan.config) as checkpoint:
        stored = [checkpoint.stored(key) for key in checkpoint.files]
    return sum(_held(DTYPES.get(word, dtype), shape, dtype) for word, shape in stored)


def result_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Weights of WholeModel of what the plan writes."""
    layouts = [file.layout for file in plan.files]
    return sum(_held(*entry, dtype) for layout in layouts for entry in layout.values())


def require(option: str, num_bytes: int) -> None:
    """Raises ResourceExhausted when an option needs more memory than there is, as far as the system
    says."""
    free = available_bytes()
    if free is not None and num_bytes > free:
        raise ResourceExhausted(
            f"{option}: whole models are held in memory, of {num_bytes / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are available",
            field=option,
        )


def available_bytes() -> int | None:
    """What Linux can give without swapping; None elsewhere."""
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _held(stored: torch.dtype, shape: Shape, dtype: torch.dtype) -> int:
    """Codes are held as they are stored; scales are few, and count as weights do."""
    return tensor_bytes(dtype if stored.is_floating_point else stored, shape)
