"""Writing a safetensors file tensor by tensor, so that no more than one is held in memory.

The file is the format of https://github.com/huggingface/safetensors: the length of a JSON header as
a little-endian uint64, the header, and the tensors one after the other. The library itself writes a
file only from all of its tensors at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from chiasm.errors import Internal
from chiasm.model.shapes import Shape

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_ALIGNMENT = 8
_MODE = 0o644

Layout = Mapping[str, tuple[torch.dtype, Shape]]
"""Dtype and shape of each tensor of a file, in the order in which they will be written."""


class SafetensorsStream:
    """A file that appears under its name when it is complete.

    Tensors are added in the order of `layout`. Leaving the context without an error finishes the
    file: it is on the disk then. After an error nothing is left. `sha256` is of the whole file.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._left = list(layout.items())[::-1]
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        header = _header(layout)
        self._file = self._partial.open("wb")
        try:
            self._write(struct.pack("<Q", len(header)) + header)
        except BaseException:
            self._discard()
            raise

    @property
    def sha256(self) -> str:
        """Of what has been written."""
        return self._digest.hexdigest()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor."""
        expected, (dtype, shape) = self._left.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, tuple(shape)):
            raise Internal(f"{name} {tensor.dtype} {list(tensor.shape)} is not {expected}'s turn")
        self._write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        if self._left:
            raise Internal(f"{self._path} lacks {self._left[-1][0]}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.chmod(_MODE)
        self._partial.replace(self._path)

    def _discard(self) -> None:
        """Leaves nothing but what has been finished."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.num_bytes += self._file.write(data)


def tensor_bytes(dtype: torch.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize


def _header(layout: Layout) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % _ALIGNMENT)
