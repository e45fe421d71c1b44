"""C++ for CPUs, compiled on first use: see build.py. What is computed is said in kernels/quant."""

from chiasm.kernels.native.build import library

__all__ = ["has_bfloat16", "has_tiles", "library"]


def has_bfloat16() -> bool:
    """Whether `chiasm_dense` was compiled for a processor that multiplies bfloat16."""
    found = library()
    return found is not None and bool(found.chiasm_has_bfloat16())


def has_tiles() -> bool:
    """Whether `chiasm_tiles` was, for one that has tiles (AMX), and the system lets us use them."""
    found = library()
    return found is not None and bool(found.chiasm_has_tiles())
