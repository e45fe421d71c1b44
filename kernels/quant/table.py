"""The 256 levels of tcq2, and how they were found.

`tcq2_table.json` is part of the format: a checkpoint carries a copy of the table that it was
encoded with. `python -m chiasm.kernels.quant.table` trains it again and prints it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

from chiasm.errors import DataLoss

STEP = 1 / 40
"""One unit of the table, for weights of variance one."""

_FILE = Path(__file__).with_name("tcq2_table.json")
_STATES = 256
_ROUNDS, _ROWS, _LENGTH = 25, 256, 2048
_SEED = 0


@functools.cache
def load() -> torch.Tensor:
    """int8 [256]. Raises DataLoss when the file is not what it was."""
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    table = torch.tensor(stored["levels"], dtype=torch.int8)
    if checksum(table) != stored["sha256"]:
        raise DataLoss(f"{_FILE} does not match its checksum", reason="CHECKPOINT_CORRUPT")
    return table


def checksum(table: torch.Tensor) -> str:
    """sha256 of the 256 bytes."""
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()


def train(rounds: int = _ROUNDS, rows: int = _ROWS, length: int = _LENGTH) -> torch.Tensor:
    """int8 [256], by Lloyd's algorithm on Gaussian weights.

    Each round encodes fresh weights with the best paths through the table so far, then moves every
    level to the mean of the weights that chose its state.
    """
    from chiasm.kernels.quant import tcq2  # which loads the table that is made here

    generator = torch.Generator().manual_seed(_SEED)
    levels = _first()
    for _ in range(rounds):
        weights = torch.randn(rows, length, generator=generator)
        unit, table = _as_integers(levels)
        local = torch.ones(rows, -(-length // 128), dtype=torch.uint8)
        codes = tcq2.paths(weights / unit, local, torch.ones(length), table)
        state = tcq2.states(codes).flatten()
        sums = torch.zeros(_STATES, dtype=torch.float64)
        sums.index_add_(0, state, weights.flatten().double())
        counts = torch.bincount(state, minlength=_STATES)
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
    return torch.round(levels / STEP).clamp(-127, 127).to(torch.int8)


def _first() -> torch.Tensor:
    """Float64 levels to begin with: of a state times a constant, the sum of the four bytes.

    Nearly normal, and scrambled, so that neighbouring states have unlike levels. The constant is
    that of turboderp's exllamav3 ("mul1").
    """
    product = (torch.arange(_STATES) * 0x83DCD12D) & 0xFFFFFFFF
    total = sum((product >> shift) & 255 for shift in (0, 8, 16, 24))
    assert isinstance(total, torch.Tensor)
    return (total.double() - 510) / 147.8


def _as_integers(levels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Rounding to the final table would stop small moves; while training the steps are finer."""
    unit = float(levels.abs().max()) / 127
    return unit, torch.round(levels / unit).to(torch.int8)


def _document(table: torch.Tensor) -> str:
    return json.dumps({"levels": table.tolist(), "sha256": checksum(table)}) + "\n"


if __name__ == "__main__":
    sys.stdout.write(_document(train()))
