"""torch tensors to wire tensors and back, with their checksums."""

from __future__ import annotations

import math

import google_crc32c
import torch

from chiasm import errors
from chiasm.v1 import tensor_pb2

_DTYPES = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DTYPE_INT32: torch.int32,
}
_WIRE = {dtype: wire for wire, dtype in _DTYPES.items()}


def to_wire(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """Any CPU-reachable tensor of float32, bfloat16 or int32 as a wire tensor."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes()
    return tensor_pb2.Tensor(
        dtype=_WIRE[tensor.dtype],
        shape=tensor.shape,
        data=data,
        crc32c=google_crc32c.value(data),
    )


def from_wire(wire: tensor_pb2.Tensor, *, name: str) -> torch.Tensor:
    """The tensor, in memory of its own.

    Raises InvalidArgument for an unknown dtype or a shape that does not fit the payload, DataLoss
    for a wrong checksum; `name` is the field named in either.
    """
    dtype = _DTYPES.get(wire.dtype)
    if dtype is None:
        raise errors.InvalidArgument(f"{name}.dtype", f"unknown dtype {wire.dtype}")
    shape = tuple(wire.shape)
    if math.prod(shape) * dtype.itemsize != len(wire.data):
        raise errors.InvalidArgument(
            f"{name}.shape", f"shape {shape} of {dtype} does not fit {len(wire.data)} bytes"
        )
    if google_crc32c.value(wire.data) != wire.crc32c:
        raise errors.DataLoss(f"{name}: checksum mismatch", field=name)
    if not wire.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(wire.data), dtype=dtype).reshape(shape)
