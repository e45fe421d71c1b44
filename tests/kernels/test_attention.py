"""Paged attention: the CPU path against the reference, over shapes, cuts and fragmentations."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels import native
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


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(20, 4, 128), (4, 2, 32), (8, 1, 64), (3, 3, 96), (7, 1, 160)]
)
@pytest.mark.parametrize("pieces", [1, 7])
def test_single_bfloat16_tokens(
    heads: int,
    kv_heads: int,
    dim: int,
    pieces: int,
) -> None:
    """Beside longer segments, and over cuts of the history; nearly as exact as their rounding."""
    if not native.has_bfloat16():
        pytest.skip("not compiled for this processor")
    g = torch.Generator().manual_seed(heads + pieces)
    lengths = [1, 2, 31, 32, 33, 1023, 1024, 1025, 2600]
    slots = torch.randperm(pieces, generator=g) * (4096 // pieces)
    runs = tuple((int(first), 4096 // pieces) for first in slots)
    cache = torch.randn(2, 4096, kv_heads, dim, generator=g).bfloat16()
    cache[1] += 3 * torch.randn(4096, kv_heads, 1, generator=g).bfloat16()
    query = (2 * torch.randn(len(lengths) + 5, heads, dim, generator=g)).bfloat16()
    key, value = torch.zeros(2, len(query), kv_heads, dim).bfloat16()
    segments = [
        Segment(row=row, start=length - 1, num_tokens=1, runs=runs)
        for row, length in enumerate(lengths)
    ]
    segments.insert(4, Segment(row=len(lengths), start=0, num_tokens=5, runs=runs))
    found = cpu.paged_attention(query, key, value, cache, segments)
    wide = reference.paged_attention(
        *(x.float() for x in (query, key, value)), cache.float(), segments
    )
    rows = slice(0, len(lengths))
    torch.testing.assert_close(found[rows].float(), wide[rows], rtol=2**-8, atol=1e-3)
    alone = cpu.paged_attention(query, key, value, cache, segments[-1:])
    assert torch.equal(alone[len(lengths) - 1], found[len(lengths) - 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(
            cpu.paged_attention(query, key, value, cache, segments)[rows], found[rows]
        )
    finally:
        torch.set_num_threads(threads)
