"""Where the Triton kernels run, and what a device says that has no memory or is lost."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of the rows that the Triton kernels take."""


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels."""
    return device.type == "cuda" and has_triton()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; torch has a class for it, and words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = "out of memory" if isinstance(error, torch.AcceleratorError) else "DefaultCPUAllocator"
    return isinstance(error, RuntimeError) and words in str(error)


def is_device_lost(error: BaseException) -> bool:
    """Whether a device failed in a way that it does not get over while the process lives: after a
    fault in a kernel CUDA answers every call with the same error, and soon."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
