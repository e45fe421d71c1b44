"""The language model's matrices that every token goes through, as int8 in a checkpoint.

    model.layers.3.self_attn.q_proj.codes   int8 [N, K]
    model.layers.3.self_attn.q_proj.scale   float32 [N]

A layer's lie in one file, those of no layer (embeddings, a head of its own) in another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from chiasm.kernels.quant.formats import Int8Matrices
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import TextConfig
from chiasm.model.expert_weights import FIELDS, read_stacks
from chiasm.model.stream import Layout
from chiasm.model.text import matrices

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def by_layer(config: TextConfig) -> dict[int | None, dict[str, tuple[int, int]]]:
    """Shapes of the matrices by name, without `.weight`; None: of no layer."""
    found: dict[int | None, dict[str, tuple[int, int]]] = {}
    for name, shape in matrices(config).items():
        match = _LAYER.match(name)
        found.setdefault(int(match[1]) if match else None, {})[name] = shape
    return found


def file_name(layer: int | None) -> str:
    return f"dense-{'vocabulary' if layer is None else f'{layer:03d}'}.safetensors"


def layout(shapes: Mapping[str, tuple[int, int]]) -> Layout:
    """The tensors that matrices become."""
    return {
        f"{name}.{part}": (field.dtype, field.shape(*shape))
        for name, shape in shapes.items()
        for part, field in FIELDS["int8"].items()
    }


def read(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], device: str | torch.device
) -> Int8Matrices:
    """A stack of one. Raises what Checkpoint.read_into raises."""
    return Int8Matrices(**read_stacks(checkpoint, "int8", shape, [f"{name}."], device))
