"""Banks of experts as a server of some shards loads them, and dimensions for all formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.synth import PRESETS
from chiasm.model.writer import Dimensions
from chiasm.types import Modality


def bank(directory: Path, modality: Modality, *, num_shards: int = 1, shard: int = 0) -> ExpertBank:
    config = ModelConfig.load(directory)
    found = ExpertBank(
        config,
        modality=modality,
        num_shards=num_shards,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with Checkpoint(directory, config) as checkpoint:
        found.load(checkpoint, shard)
    return found


def matrices(found: ExpertBank, layer: int) -> list[Any]:
    weights = found.weights(layer, found.shards[0])
    return [weights.gate_up, weights.down]


LARGE = replace(
    PRESETS["tiny"],
    hidden_size=512,
    num_heads=16,
    num_kv_heads=4,
    text_intermediate=1024,
    vision_intermediate=512,
    shard_bytes=64 << 20,
)
"""Dimensions of a model beside which a process is small: about 250 MB in bfloat16."""


def wide(num_layers: int = 2) -> Dimensions:
    """Dimensions that every format and the rotation take."""
    return replace(
        PRESETS["tiny"], num_layers=num_layers, text_intermediate=128, vision_intermediate=128
    )
