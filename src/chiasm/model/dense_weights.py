"""The language model's matrices that every token goes through, as int8 in a checkpoint.

    model.layers.3.self_attn.q_proj.codes   int8 [N, K]
    model.layers.3.self_attn.q_proj.scale   float32 [N]

A layer's lie in one file, those of no layer (embeddings, a head of its own) in another.
"""

from __future__ import annotations

import re

import torch

from chiasm.kernels.quant.formats import Int8Matrices
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import TextConfig
from chiasm.model.expert_weights import FIELDS
from chiasm.model.stream import Layout
from chiasm.model.text import matrices

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def by_layer(config: TextConfig) -> dict[int | None, list[str]]:
    """Names of the matrices, without `.weight`; None: of no layer."""
    found: dict[int | None, list[str]] = {}
    for name in matrices(config):
        match = _LAYER.match(name)
        found.setdefault(int(match[1]) if match else None, []).append(name)
    return found


def file_name(layer: int | None) -> str:
    return f"dense-{'vocabulary' if layer is None else f'{layer:03d}'}.safetensors"


def layout(config: TextConfig, names: list[str]) -> Layout:
    """The tensors that matrices become."""
    shapes = matrices(config)
    return {
        f"{name}.{part}": (field.dtype, field.shape(*shapes[name]))
        for name in names
        for part, field in FIELDS["int8"].items()
    }


def read(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], device: str | torch.device
) -> Int8Matrices:
    """A stack of one. Raises what Checkpoint.read_into raises."""
    stacks = {}
    for part, field in FIELDS["int8"].items():
        stack = torch.empty((1, *field.shape(*shape)), dtype=field.dtype)
        checkpoint.read_into(f"{name}.{part}", stack[0])
        stacks[part] = stack.to(device)
    return Int8Matrices(**stacks)
