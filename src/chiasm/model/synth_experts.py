"""Random routed experts in low precision, written straight: no weight in full width is ever made.

Codes are random bytes; scales are such that the weights vary as those of `synth` do. Every tensor
is drawn from its own generator, seeded by name.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from chiasm.kernels.quant import table
from chiasm.model.config import ModelConfig
from chiasm.model.expert_weights import (
    DOWN,
    FIELDS,
    GATE_UP,
    TABLE_FILE,
    TABLE_KEY,
    TABLE_LAYOUT,
    Bank,
    Field,
)
from chiasm.model.quantization import STORED, ExpertFormat, Quantization
from chiasm.model.stream import Layout, SafetensorsStream
from chiasm.types import Modality

_MIN_LOCAL = 192
"""Local scales of tcq2 lie between this and 255, for they too should be read, not assumed."""


def uniform(config: ModelConfig, precision: str) -> Quantization:
    """All routed experts in one precision, or none in any."""
    if precision == STORED:
        return Quantization()
    formats = {
        (layer, modality): ExpertFormat(precision)
        for layer in config.text.moe_layers
        for modality in Modality
    }
    is_coded = precision == "tcq2"
    return Quantization(
        formats=formats, table_sha256=table.checksum(table.load()) if is_coded else ""
    )


def write_experts(
    directory: Path, config: ModelConfig, *, seed: int, gain: Callable[[str], float]
) -> dict[str, Layout]:
    """Writes all experts as config.quantization says; returns what each file holds.

    gain(name): what the standard deviation of a matrix is, times the root of its inputs.
    """
    written: dict[str, Layout] = {}
    for (layer, modality), form in config.quantization.formats.items():
        bank = Bank.to_encode(config, layer, modality, form)
        written[bank.file_name] = _write_bank(directory, bank, seed, gain)
    if config.quantization.table_sha256:
        with SafetensorsStream(directory / TABLE_FILE, TABLE_LAYOUT) as stream:
            stream.add(TABLE_KEY, table.load())
        written[TABLE_FILE] = TABLE_LAYOUT
    return written


def _write_bank(directory: Path, bank: Bank, seed: int, gain: Callable[[str], float]) -> Layout:
    precision, layout = bank.format.precision, bank.layout()
    bank.check_widths()
    with SafetensorsStream(directory / bank.file_name, layout) as stream:
        for expert, projection in itertools.product(
            range(bank.config.text.num_experts), (GATE_UP, DOWN)
        ):
            shape = bank.shape(projection)
            deviation = gain(projection) / math.sqrt(shape[1])
            for part, name in bank.tensor_names(expert, projection).items():
                field = FIELDS[precision][part]
                value = _draw(f"{seed}/{name}", precision, part, field, shape)
                if value.is_floating_point():
                    value = value * deviation
                stream.add(name, value.to(field.dtype))
    return layout


def _draw(
    key: str, precision: str, part: str, field: Field, shape: tuple[int, int]
) -> torch.Tensor:
    """Codes as they are stored; scales, as float32, for weights of deviation one."""
    size = field.shape(*shape)
    if field.dtype in (torch.uint8, torch.int8):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        data = np.random.default_rng(seed).bytes(math.prod(size))
        codes = torch.frombuffer(bytearray(data), dtype=field.dtype).view(size)
        if part == "local":
            codes = _MIN_LOCAL + (codes >> 2)
        return codes
    return torch.full(size, _UNIT[precision, part]())


def _tcq2_row() -> float:
    local = torch.arange(_MIN_LOCAL, 256).float()
    levels = table.load().float()
    return 1 / float((levels.square().mean() * local.square().mean()).sqrt())


_NIBBLES = math.sqrt((16**2 - 1) / 12)
"""Deviation of 0..15."""

_UNIT: dict[tuple[str, str], Callable[[], float]] = {
    ("int8", "scale"): lambda: 1 / math.sqrt((256**2 - 1) / 12),
    ("int4", "scale"): lambda: 1 / _NIBBLES,
    ("int4", "zero"): lambda: 0.5 / _NIBBLES,  # the mean of the codes is half a step below 8
    ("tcq2", "row"): _tcq2_row,
}
