"""C++ for CPUs, compiled on first use: see build.py. What is computed is said in kernels/quant."""

import functools
from typing import Any

from chiasm.kernels.native.build import library

__all__ = ["has_bfloat16", "has_tiles", "lanes", "library"]


def has_bfloat16() -> bool:
    """Whether `chiasm_attend`, and products of bfloat16 matrices, were compiled."""
    return bool(_asked(library(), "chiasm_has_bfloat16"))


def lanes() -> int:
    """Bits of the registers that `chiasm_linear` was written for; 0: of no processor's."""
    return _asked(library(), "chiasm_lanes")


def has_tiles() -> bool:
    """Whether `chiasm_tiles` was, for one that has tiles (AMX), and the system lets us use them."""
    return bool(_asked(library(), "chiasm_has_tiles"))


@functools.cache
def _asked(found: Any, name: str) -> int:
    """Once: every product wants to know."""
    return 0 if found is None else int(getattr(found, name)())
