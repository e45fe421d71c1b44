"""From a trained model to a checkpoint that serves, in the hub's -PT layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig, TextConfig
from chiasm.model.shapes import Shape, expert_prefix
from chiasm.model.writer import Dimensions, write_description, write_weights
from chiasm.training.data.processing import write_processing
from chiasm.training.model import TrainingModel
from chiasm.types import Modality

Weights = Mapping[str, torch.Tensor]


def describe(
    directory: Path, dimensions: Dimensions, tokenizer: Tokenizer, *, dtype: str
) -> ModelConfig:
    """Writes a checkpoint's files without weights; what encodes samples needs no more."""
    directory.mkdir(parents=True, exist_ok=True)
    config = write_description(directory, dimensions, tokenizer, dtype=dtype)
    write_processing(directory)
    return config


def export(
    model: TrainingModel, weights: Weights, description: Path, directory: Path, *, shard_bytes: int
) -> None:
    """Copies `description` to a new `directory` and adds the weights, in the description's dtype.

    weights: of all parameters of `model`, by name: its own, or their average. Of a shared pool both
    banks are the same experts behind the same gate, so that it serves as it was trained.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(description, partial)
    tensors = canonical(weights, model.config.text, shared_pool=model.shared_pool)

    def tensor(name: str, shape: Shape) -> torch.Tensor:
        assert tensors[name].shape == shape, name
        return tensors[name].detach().clone(memory_format=torch.contiguous_format)  # none shared

    write_weights(partial, ModelConfig.load(partial), tensor, shard_bytes=shard_bytes)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


@torch.no_grad()
def adopt(model: TrainingModel, directory: Path) -> None:
    """Gives a model the weights of a checkpoint that serves: what `export` writes, back again.

    Probes and an average, which such a checkpoint has none of, stay as they are. Raises what
    Checkpoint raises.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with Checkpoint(directory, model.config) as stored:
        for name, tensor in canonical(weights, model.config.text).items():
            tensor.copy_(stored.get(name, tensor.shape))


def canonical(
    weights: Weights, text: TextConfig, *, shared_pool: bool = False
) -> dict[str, torch.Tensor]:
    """Parameters of a TrainingModel by the hub's names: the same memory, but of a shared pool."""
    prefixes = {
        "language.": "",
        "vision.": "vision_model.",
        "resampler.": "model.resampler_model.",
    }
    tensors = {}
    for name, value in weights.items():
        for prefix, published in prefixes.items():
            if name.startswith(prefix):
                tensors[published + name.removeprefix(prefix)] = value
    for layer in text.moe_layers:
        if shared_pool:
            _repeat_text_bank(tensors, f"model.layers.{layer}.mlp.")
        for modality in Modality:
            stored = Modality.TEXT if shared_pool else modality
            bank = f"experts.banks.{stored}_{layer}."
            _split_bank(
                tensors, weights[f"{bank}gate_up"], weights[f"{bank}down"], text, layer, modality
            )
    return tensors


def _repeat_text_bank(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    tensors[f"{prefix}gate.weight_1"] = tensors[f"{prefix}gate.weight"].clone()
    bias = f"{prefix}moe_statics.e_score_correction_bias"
    tensors[bias] = tensors[bias][:1].repeat(2, 1)


def _split_bank(
    tensors: dict[str, torch.Tensor],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    text: TextConfig,
    layer: int,
    modality: Modality,
) -> None:
    """One tensor per expert and projection."""
    for expert in range(text.num_experts):
        prefix = expert_prefix(text, layer, modality, expert)
        gate, up = gate_up[expert].chunk(2)
        tensors[f"{prefix}gate_proj.weight"] = gate
        tensors[f"{prefix}up_proj.weight"] = up
        tensors[f"{prefix}down_proj.weight"] = down[expert]
