"""Where the Triton kernels run, and what a device without memory says."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels."""
    return device.type == "cuda" and has_triton()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; of the latter torch tells in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
