"""torch tensors to wire tensors and back, with their checksums."""

from __future__ import annotations

import math

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from chiasm import errors
from chiasm.transport.shared_memory import Arena, Bytes, Region
from chiasm.v1 import tensor_pb2

_DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_INT32: torch.int32,
}
MAX_DIMENSIONS = 8
"""Of a tensor that is received; what travels has two."""

_WIRE = {dtype: wire for wire, dtype in _DTYPES.items()}


def to_wire(tensor: torch.Tensor, region: Region | None = None) -> tensor_pb2.Tensor:
    """Any CPU-reachable tensor of float32, bfloat16 or int32 as a wire tensor.

    The bytes go into the message, or into `region`; raises InvalidArgument when they do not fit.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy()
    wire = tensor_pb2.Tensor(
        dtype=_WIRE[tensor.dtype], shape=tensor.shape, crc32c=google_crc32c.value(data)
    )
    if region is None:
        wire.data = data.tobytes()
    else:
        wire.shared.offset, wire.shared.length = region.put(data), data.size
    return wire


def from_wire(wire: tensor_pb2.Tensor, *, name: str, arena: Arena | None = None) -> torch.Tensor:
    """The tensor, in memory of its own.

    Raises InvalidArgument for an unknown dtype, more than MAX_DIMENSIONS, a shape that does not fit
    the payload, or a payload in shared memory where there is no `arena`; DataLoss for a wrong
    checksum. `name` is the field named in either.
    """
    dtype = _DTYPES.get(wire.dtype)
    if dtype is None:
        raise errors.InvalidArgument(f"{name}.dtype", f"unknown dtype {wire.dtype}")
    if len(wire.shape) > MAX_DIMENSIONS:
        raise errors.InvalidArgument(f"{name}.shape", f"has more than {MAX_DIMENSIONS} dimensions")
    shape = tuple(wire.shape)
    num_bytes = wire.shared.length if wire.HasField("shared") else len(wire.data)
    if math.prod(shape) * dtype.itemsize != num_bytes:
        raise errors.InvalidArgument(
            f"{name}.shape", f"shape {shape} of {dtype} does not fit {num_bytes} bytes"
        )
    data = _payload(wire, name, arena)
    if google_crc32c.value(data) != wire.crc32c:
        raise errors.DataLoss(f"{name}: checksum mismatch", field=name)
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def holds(wire: tensor_pb2.Tensor, expected: npt.NDArray[np.int32], arena: Arena | None) -> bool:
    """Whether a wire tensor is exactly this one; comparing the bytes does what a checksum would.

    Raises InvalidArgument and DataLoss as `from_wire` does.
    """
    return (
        wire.dtype == tensor_pb2.DTYPE_INT32
        and len(wire.shape) == expected.ndim
        and tuple(wire.shape) == expected.shape
        and _payload(wire, "expected", arena).tobytes() == expected.tobytes()
    )


def _payload(wire: tensor_pb2.Tensor, name: str, arena: Arena | None) -> Bytes:
    """A copy of the bytes."""
    if not wire.HasField("shared"):
        return np.frombuffer(bytearray(wire.data), dtype=np.uint8)
    if arena is None:
        raise errors.InvalidArgument(f"{name}.shared", "there is no shared memory on this way")
    return arena.read(wire.shared.offset, wire.shared.length)
