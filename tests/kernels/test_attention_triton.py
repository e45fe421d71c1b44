"""The Triton path of paged attention against the reference; interpreted where there is no GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from chiasm import errors
from chiasm.kernels import attention
from chiasm.kernels.attention import Segment, launch, metadata, reference

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SPARE_SLOTS = 97

Shape = tuple[int, int]
"""History, and new tokens."""

RAGGED: list[Shape] = [(0, 1), (0, 17), (40, 1), (63, 5), (16, 48), (99, 1)]
LONG: list[Shape] = [(1030, 1), (511, 1), (512, 1), (505, 20), (0, 3)]


class Case:
    """A batch over a cache whose slots are NaN unless some token of it stands there.

    Blocks of `block` slots are dealt out at random, `together` in a row where the luck holds.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        block: int = 16,
        together: int = 3,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        counts = [-(-(start + n) // block) for start, n in shapes]
        num_groups = -(-(sum(counts) + SPARE_SLOTS // block) // together)
        order = torch.randperm(num_groups, generator=g)
        blocks = (order[:, None] * together + torch.arange(together)).flatten().tolist()
        num_slots, total = num_groups * together * block, sum(n for _, n in shapes)
        self.query = torch.randn(total, heads, dim, generator=g).to(DEVICE, dtype)
        drawn = torch.randn(2, num_slots, kv_heads, dim, generator=g).to(DEVICE, dtype)
        self.cache = torch.full_like(drawn, float("nan"))
        self.segments: list[Segment] = []
        row = 0
        for (start, n), count in zip(shapes, counts, strict=True):
            mine, blocks = blocks[:count], blocks[count:]
            self.segments.append(
                Segment(row=row, start=start, num_tokens=n, runs=runs(mine, block))
            )
            slots = torch.tensor([b * block + i for b in mine for i in range(block)])[: start + n]
            self.cache[:, slots] = drawn[:, slots]
            row += n

    def triton(self, segments: Sequence[Segment] | None = None) -> torch.Tensor:
        return run(self.query, self.cache, segments or self.segments)

    def reference(self) -> torch.Tensor:
        unread = self.query[:, : self.cache.shape[2]]
        return reference.paged_attention(self.query, unread, unread, self.cache, self.segments)


def run(query: torch.Tensor, cache: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    unread = query[:, : cache.shape[2]]
    return launch.paged_attention(query, unread, unread, cache, segments)


def runs(blocks: Sequence[int], size: int) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and sum(found[-1]) == block * size:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((block * size, size))
    return tuple(found)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype is expected.dtype
    assert not found.isnan().any()
    assert (found.float() - expected.float()).abs().max() <= TOLERANCE[expected.dtype]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (3, 3, 16, torch.float32),
        (10, 2, 128, torch.float16),
        (8, 1, 80, torch.float32),
        (6, 1, 256, torch.float16),
    ],
)
@pytest.mark.parametrize("shapes", [RAGGED, LONG], ids=["ragged", "long"])
def test_equals_reference(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, shapes: list[Shape]
) -> None:
    case = Case(shapes, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=heads)
    assert_close(case.triton(), case.reference())


@pytest.mark.parametrize("seed", range(6))
def test_equals_reference_on_random_batches(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=g))

    shapes = [(draw(300) * draw(3), 1 + draw(2) * draw(60)) for _ in range(1 + draw(6))]
    kv_heads, group = 1 + draw(2), 1 + draw(8)
    case = Case(
        shapes,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=8 * (1 + draw(9)),
        block=(1, 3, 8, 16, 24, 64)[seed],
        together=1 + draw(4),
        seed=seed,
    )
    assert_close(case.triton(), case.reference())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("shapes", [RAGGED, LONG], ids=["ragged", "long"])
def test_bfloat16_equals_reference(dim: int, shapes: list[Shape]) -> None:
    """On a GPU only: Triton's interpreter multiplies bfloat16 matrices wrongly."""
    case = Case(shapes, heads=20, kv_heads=4, dim=dim, dtype=torch.bfloat16)
    assert_close(case.triton(), case.reference())


def test_a_segment_gets_the_same_bits_alone_and_in_a_batch() -> None:
    case = Case([*LONG, *RAGGED], heads=5, kv_heads=1, dim=64, dtype=torch.float16, seed=1)
    together = case.triton()
    for segment in case.segments:
        rows = slice(segment.row, segment.row + segment.num_tokens)
        single = Segment(
            row=0, start=segment.start, num_tokens=segment.num_tokens, runs=segment.runs
        )
        assert torch.equal(run(case.query[rows], case.cache, [single]), together[rows])


@pytest.mark.parametrize("cuts", [[1], [17, 18, 499, 512, 513]])
def test_a_token_gets_the_same_bits_however_its_prompt_is_cut(cuts: list[int]) -> None:
    case = Case([(0, 520)], heads=5, kv_heads=1, dim=32, seed=2)
    edges = [0, *cuts, 520]
    chunks = [
        Segment(row=a, start=a, num_tokens=b - a, runs=case.segments[0].runs)
        for a, b in itertools.pairwise(edges)
    ]
    assert torch.equal(case.triton(chunks), case.triton())


@pytest.mark.parametrize("max_rows", [0, 60, 120])
def test_bits_do_not_depend_on_how_splits_are_spread(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(LONG, heads=4, kv_heads=1, dim=48, seed=3)
    spread = metadata.prepare(case.segments, DEVICE, group=4)
    monkeypatch.setattr(metadata, "MAX_PARTIAL_ROWS", max_rows)
    bounded = metadata.prepare(case.segments, DEVICE, group=4)
    assert bounded.num_partial_rows <= max_rows < spread.num_partial_rows
    expected = launch.paged_attention(
        case.query, case.query, case.query, case.cache, case.segments, spread
    )
    assert torch.equal(case.triton(), expected)


def test_prepared_metadata_and_strided_queries_change_nothing() -> None:
    case = Case(LONG, heads=4, kv_heads=2, dim=32, seed=4)
    expected = case.triton()
    wide = torch.cat([case.query, case.query], dim=1)[:, 2:6]
    order = [2, 3, 0, 1]
    prepared = metadata.prepare(case.segments, DEVICE, group=2)
    found = launch.paged_attention(wide, wide, wide, case.cache.flip(2), case.segments, prepared)
    assert torch.equal(found, expected[:, order])


def test_a_run_may_reach_beyond_the_sequence_and_into_other_slots() -> None:
    case = Case([(10, 3)], heads=4, kv_heads=2, dim=16)
    longer = Segment(row=0, start=10, num_tokens=3, runs=((case.segments[0].runs[0][0], 10_000),))
    assert torch.equal(case.triton([longer]), case.triton())


def test_what_does_not_fit_together_is_refused_before_it_runs() -> None:
    case = Case([(10, 3)], heads=4, kv_heads=2, dim=16)
    query, cache = case.query, case.cache
    prepared = metadata.prepare(case.segments, DEVICE, group=2)
    for bad_query, bad_cache in [
        (query.double(), cache.double()),
        (query.half(), cache),
        (query[:2], cache),
        (query[:, :2], cache),
        (query[..., :8], cache),
        (query, cache[:, : prepared.num_slots - 1]),
        (query.transpose(0, 2).contiguous().transpose(0, 2), cache),
    ]:
        with pytest.raises(errors.Internal):
            launch.paged_attention(
                bad_query, bad_query, bad_query, bad_cache, case.segments, prepared
            )
    with pytest.raises(errors.Internal, match="65 heads"):
        metadata.prepare(case.segments, DEVICE, group=65)


def test_entry_point_prepares_what_the_device_needs() -> None:
    case = Case(RAGGED, heads=4, kv_heads=2, dim=32)
    prepared = attention.prepare(case.segments, DEVICE, group=2)
    is_on_cpu = DEVICE.type == "cpu"
    assert isinstance(prepared, attention.Singles if is_on_cpu else attention.Metadata)
    unread = case.query[:, :2]
    if DEVICE.type == "cuda":
        found = attention.paged_attention(
            case.query, unread, unread, case.cache, case.segments, prepared
        )
        assert torch.equal(found, case.triton())


def test_kernels_compile(tmp_path: Path) -> None:
    """Blocks of as many keys as a tile has rows, and of fewer."""
    script = Path(__file__).with_name("compile_attention.py")
    done = subprocess.run(
        [sys.executable, "-P", script, "80,bf16,128,5", "90,bf16,256,4"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
