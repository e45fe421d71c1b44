"""Where the Triton kernels run."""

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
