"""Shared memory: arenas, their regions and slots, and tensors in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chiasm import errors
from chiasm.transport import shared_memory, tensors


def test_arenas_have_bounds() -> None:
    descriptor = shared_memory.create(1 << 16)
    arena = shared_memory.Arena(descriptor, 1 << 16, is_writable=True)
    region = shared_memory.Region(arena, 128, 256)
    data = np.arange(100, dtype=np.uint8)
    first, second = region.put(data), region.put(data[::-1].copy())
    assert first >= 128
    assert second % shared_memory.ALIGNMENT == 0
    assert second >= first + 100
    with pytest.raises(errors.InvalidArgument):
        region.put(data)
    reader = shared_memory.open_received(descriptor, 1 << 16, max_bytes=1 << 16, is_writable=False)
    assert np.array_equal(reader.read(first, 100), data)
    assert np.array_equal(reader.read(second, 100), data[::-1])
    with pytest.raises(errors.DataLoss):
        reader.read((1 << 16) - 50, 100)
    with pytest.raises(ValueError, match="read-only"):
        reader.write(0, data)
    with pytest.raises(errors.InvalidArgument):
        shared_memory.Region(arena, 1 << 16, 1)
    for num_bytes, max_bytes in ((1 << 15, 1 << 16), (1 << 16, 1 << 15), (0, 1)):
        with pytest.raises(errors.InvalidArgument):
            shared_memory.open_received(
                descriptor, num_bytes, max_bytes=max_bytes, is_writable=False
            )


def test_slots_are_taken_lowest_first() -> None:
    slots = shared_memory.Slots(3, 100)
    assert [slots.take() for _ in range(4)] == [0, 100, 200, None]
    slots.give_back(100)
    slots.give_back(0)
    assert [slots.take() for _ in range(3)] == [0, 100, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (), (3,), (17, 9)])
def test_tensors_travel_by_either_way(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = (100 * torch.randn(shape)).to(dtype)
    arena = shared_memory.Arena(shared_memory.create(1 << 14), 1 << 14, is_writable=True)
    inline = tensors.to_wire(given)
    shared = tensors.to_wire(given, shared_memory.Region(arena, 64, 8192))
    assert not shared.data
    assert inline.crc32c == shared.crc32c
    for found in (
        tensors.from_wire(inline, name="x"),
        tensors.from_wire(shared, name="x", arena=arena),
    ):
        assert found.dtype is dtype
        assert torch.equal(found, given)
    with pytest.raises(errors.InvalidArgument, match="shared memory"):
        tensors.from_wire(shared, name="x")
