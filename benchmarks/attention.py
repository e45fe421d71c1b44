"""Decode attention over a long history: cost per token against the bytes it must read.

The cost must grow with the bytes and with nothing else: the history is read in place, whether its
blocks lie in one run or in many.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chiasm.kernels.attention import Segment, paged_attention

HEADS, KV_HEADS, HEAD_DIM = 20, 4, 128
"""The published model's geometry."""

LENGTHS = (1024, 4096, 8192, 16384, 32768)
RUNS = (1, 16)
REPEATS = 15


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Times one layer's attention for one new token; returns microseconds and bytes a second."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_runs in RUNS:
            for length in LENGTHS:
                seconds = _measure(length, num_runs, dtype)
                num_bytes = 2 * length * KV_HEADS * HEAD_DIM * dtype.itemsize
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "runs": num_runs,
                        "tokens": length,
                        "us": seconds * 1e6,
                        "bytes_per_s": num_bytes / seconds,
                    }
                )
                report(
                    f"{dtype} {length:6d} tokens in {num_runs:2d} runs: {seconds * 1e6:8.0f} us, "
                    f"{num_bytes / seconds / 1e9:5.1f} GB/s"
                )
    return {"one_layer_one_token": rows}


def _measure(length: int, num_runs: int, dtype: torch.dtype) -> float:
    """Median seconds."""
    cache = torch.randn(2, length, KV_HEADS, HEAD_DIM).to(dtype)
    query = torch.randn(1, HEADS, HEAD_DIM).to(dtype)
    key = torch.randn(1, KV_HEADS, HEAD_DIM).to(dtype)
    size = length // num_runs
    runs = tuple((i * size, size) for i in reversed(range(num_runs)))
    segment = Segment(row=0, start=length - 1, num_tokens=1, runs=runs)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        paged_attention(query, key, key, cache, [segment])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
