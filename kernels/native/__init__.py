"""C++ for CPUs, compiled on first use: see build.py. What is computed is said in kernels/quant."""

from chiasm.kernels.native.build import has_bfloat16, library

__all__ = ["has_bfloat16", "library"]
