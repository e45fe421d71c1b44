"""C++ for CPUs, compiled on first use: see build.py. What is computed is said in kernels/quant."""

import functools
from typing import Any

from chiasm.kernels.native.build import library

__all__ = ["has_bfloat16", "has_tiles", "library"]


def has_bfloat16() -> bool:
    """Whether `chiasm_dense` was compiled for a processor that multiplies bfloat16."""
    return _says(library(), "chiasm_has_bfloat16")


def has_tiles() -> bool:
    """Whether `chiasm_tiles` was, for one that has tiles (AMX), and the system lets us use them."""
    return _says(library(), "chiasm_has_tiles")


@functools.cache
def _says(found: Any, name: str) -> bool:
    """Asked once: every product wants to know."""
    return found is not None and bool(getattr(found, name)())
