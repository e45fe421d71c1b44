"""Tile sizes of the grouped products, by GPU, format, dtype, shape and tokens per expert.

`python -m benchmarks.moe_gpu --tune` measures them and writes `<name of the GPU>.json` beside this
file; where there is no file, or none of its entries fits, sizes follow from `default_tile`. They
decide speed, and how a product rounds on its way: servers that should agree to the bit must have
the same files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from chiasm.kernels.moe.operands import GROUPED, Format
from chiasm.kernels.quant.formats import GROUP

FOLDER = Path(__file__).parent

HEIGHTS = (16, 32, 64, 128)
"""block_m of the default tiles, each for as many tokens per expert."""

Operation = Literal["gate_up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program works on: block_m pairs times block_n rows of a matrix, block_k at a time.

    Powers of two from 16. block_k is GROUP for int4 and tcq2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One grouped product: matrices [N, K] of a format times rows of a dtype."""

    operation: Operation
    format: Format
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """As in `down int4 bfloat16 2560x1536`."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.format} {name} {self.shape[0]}x{self.shape[1]}"


Tuned = dict[str, dict[int, Tile]]
"""Per problem, the tile for up to so many tokens per expert."""


def choose(gpu: str, problem: Problem, tokens_per_expert: int) -> Tile:
    """The measured tile for the next number of tokens that was measured, or the default."""
    tuned = load(gpu).get(problem.key)
    if not tuned:
        return default_tile(problem, tokens_per_expert)
    return tuned[min((n for n in tuned if n >= tokens_per_expert), default=max(tuned))]


def default_tile(problem: Problem, tokens_per_expert: int) -> Tile:
    """Not measured. Few tokens: the matrix is read once, so much of it should be under way.

    Many: square tiles, which read least; codes are then decoded before the product. All fit 99 KiB
    of shared memory, and their sums fit registers.
    """
    tokens = 1 << (tokens_per_expert - 1).bit_length()
    if problem.format in GROUPED:
        block_m = min(32, max(HEIGHTS[0], tokens))
        return Tile(block_m=block_m, block_n=64, block_k=GROUP, num_warps=8, num_stages=3)
    block_m = min(HEIGHTS[-1], max(HEIGHTS[0], tokens))
    narrow = max(1, problem.dtype.itemsize // 2)
    if block_m <= 32:
        return Tile(block_m=block_m, block_n=64, block_k=128 // narrow, num_warps=4, num_stages=4)
    return Tile(
        block_m=block_m,
        block_n=128,
        block_k=64 // narrow,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )


@functools.cache
def load(gpu: str) -> Tuned:
    """What was measured on a GPU; empty where nothing was."""
    path = path_of(gpu)
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: {int(n): Tile(**tile) for n, tile in tiles.items()} for key, tiles in stored.items()
    }


def save(gpu: str, measured: Iterable[tuple[Problem, dict[int, Tile]]]) -> Path:
    """Adds to a GPU's file, in place of what it says of the same problems; returns its path."""
    tuned = load(gpu) | {problem.key: tiles for problem, tiles in measured}
    stored = {
        key: {str(n): asdict(tile) for n, tile in sorted(tiles.items())}
        for key, tiles in sorted(tuned.items())
    }
    path_of(gpu).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    load.cache_clear()
    return path_of(gpu)


def path_of(gpu: str) -> Path:
    """As in NVIDIA_H100_80GB_HBM3.json."""
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in gpu)
    return FOLDER / f"{name}.json"
