"""Paged attention: the CPU path against the reference, over shapes, cuts and fragmentations."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.attention import Segment, cpu, reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
SLOTS = 600


def fragmented(num_slots: int, pieces: int, g: torch.Generator, taken: set[int]) -> list[int]:
    """`num_slots` slots in about `pieces` runs at random places nobody else has."""
    size = -(-num_slots // pieces)
    runs: list[int] = []
    while len(runs) < num_slots:
        length = min(size, num_slots - len(runs))
        start = int(torch.randint(0, SLOTS - length, (1,), generator=g))
        wanted = range(start, start + length)
        if not taken.intersection(wanted):
            taken.update(wanted)
            runs.extend(wanted)
    return runs


def as_runs(slots: list[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return tuple(runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (20, 4, 16), (3, 3, 8)])
@pytest.mark.parametrize("pieces", [1, 3, 9])
def test_cpu_equals_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, pieces: int
) -> None:
    g = torch.Generator().manual_seed(heads * pieces)
    shapes = [(0, 1), (0, 17), (40, 1), (63, 5), (16, 48), (99, 1)]  # (history, new tokens)
    cache = torch.randn(2, SLOTS, kv_heads, dim, generator=g).to(dtype)
    total = sum(n for _, n in shapes)
    query = torch.randn(total, heads, dim, generator=g).to(dtype)
    key, value = (torch.randn(total, kv_heads, dim, generator=g).to(dtype) for _ in range(2))
    segments, row, taken = [], 0, set[int]()
    for start, num_tokens in shapes:
        slots = fragmented(start + num_tokens, pieces, g, taken)
        segments.append(Segment(row=row, start=start, num_tokens=num_tokens, runs=as_runs(slots)))
        new = torch.tensor(slots[start:])
        cache[0, new], cache[1, new] = key[row : row + num_tokens], value[row : row + num_tokens]
        row += num_tokens
    expected = reference.paged_attention(query, key, value, cache, segments)
    found = cpu.paged_attention(query, key, value, cache, segments)
    assert not found.isnan().any()
    assert torch.allclose(found.float(), expected.float(), atol=TOLERANCE[dtype])


def test_slots_beyond_the_sequence_are_never_read() -> None:
    """A run may be longer than the sequence: what lies there belongs to the future."""
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 64, 2, 8, generator=g)
    query = torch.randn(3, 4, 8, generator=g)
    key, value = cache[0, 10:13].clone(), cache[1, 10:13].clone()
    segment = Segment(row=0, start=10, num_tokens=3, runs=((0, 64),))
    found = cpu.paged_attention(query, key, value, cache, [segment])
    cache[:, 13:] = float("nan")
    again = cpu.paged_attention(query, key, value, cache, [segment])
    assert torch.equal(found, again)
    assert torch.allclose(
        found, reference.paged_attention(query, key, value, cache, [segment]), atol=2e-6
    )
