"""The compiled kernels as other processors have them."""

from __future__ import annotations

import ctypes
import functools
import platform

import pytest
import torch

from chiasm.kernels import dense, native
from chiasm.kernels.native import build

_FLAGS = {"AVX2": ("-march=x86-64-v3",), "any processor": ("-DCHIASM_GENERIC",)}
_LANES = {"AVX2": 256, "any processor": 0}


def be_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test; skips it where this processor cannot run the other's code.

    name: "this processor", which changes nothing, "AVX2" or "any processor". With AVX2 torch has
    no products of bfloat16, so all rows take the compiled ones.
    """
    if name == "this processor":
        return
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if name == "AVX2" and not (platform.machine() == "x86_64" and has_avx2):
        pytest.skip("this processor has no AVX2")
    library = _compiled(name)
    assert library.chiasm_lanes() == _LANES[name]
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(dense, "torch_has_bfloat16", lambda: name != "AVX2")


@functools.cache
def _compiled(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build.compiled(_FLAGS[name])))
