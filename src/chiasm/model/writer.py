"""Writing a checkpoint in the hub's -PT layout: configuration, tokenizer and weights.

Bytes depend on nothing but what is passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from chiasm.model import synth_tokenizer
from chiasm.model.config import ModelConfig
from chiasm.model.shapes import Shape, tensor_shapes
from chiasm.model.stream import Layout, tensor_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FP32_SUFFIXES = (".mlp.gate.weight", ".mlp.gate.weight_1", ".e_score_correction_bias")
"""Tensors that are float32 in every checkpoint, as published."""
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Of a small model; names as in TextConfig and VisionConfig."""

    num_bpe_tokens: int
    """Vocabulary without the special tokens."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    moe_k: int
    num_experts: int
    text_intermediate: int
    vision_intermediate: int
    num_shared_experts: int
    vision_depth: int
    vision_hidden_size: int
    vision_num_heads: int
    vision_mlp_ratio: int
    max_pixels: int
    """Bound of an image's size after resizing."""
    shard_bytes: int
    """Size at which the next safetensors file begins."""
    vocab_size: int = 0
    """Rows of the embedding; 0: the tokenizer's, rounded up."""


def write_description(
    directory: Path, dimensions: Dimensions, tokenizer: Tokenizer, *, dtype: str
) -> ModelConfig:
    """Writes everything but the weights into an existing directory, and reads it back."""
    synth_tokenizer.write_tokenizer(
        tokenizer, directory, model_max_length=dimensions.max_position_embeddings
    )
    write_json(directory / "config.json", _config(dimensions, tokenizer, dtype))
    write_json(directory / "generation_config.json", _generation_config(tokenizer))
    write_json(directory / "preprocessor_config.json", _preprocessor_config(dimensions))
    return ModelConfig.load(directory)


def write_weights(
    directory: Path,
    config: ModelConfig,
    tensor: Callable[[str, Shape], torch.Tensor],
    *,
    shard_bytes: int,
    is_wanted: Callable[[str], bool] = lambda _: True,
    written: Mapping[str, Layout] | None = None,
) -> None:
    """Writes `tensor(name, shape)` of every tensor of `config` that is wanted, by canonical name.

    They are stored as config.dtype, routers and their biases as float32. A file closes when it has
    reached `shard_bytes`; of several there is an index. written: what files hold that are there
    already, by name.
    """
    shapes, dtype = tensor_shapes(config), DTYPES[config.dtype]
    shapes = {name: shape for name, shape in shapes.items() if is_wanted(name)}
    shards = list(_cut(shapes, dtype, shard_bytes))
    weight_map, total_size = {}, 0
    for file, layout in (written or {}).items():
        weight_map.update(dict.fromkeys(layout, file))
        total_size += sum(tensor_bytes(*entry) for entry in layout.values())
    for number, names in enumerate(shards, start=1):
        tensors = {}
        for name in names:
            value = tensor(name, shapes[name])
            value = value.to(torch.float32 if name.endswith(FP32_SUFFIXES) else dtype)
            tensors[name] = value
            total_size += value.nbytes
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 and not written else file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes it private; a pool's user reads it too
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1 or written:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _config(dimensions: Dimensions, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json with the hub's flat keys."""
    num_tokens = max(tokenizer.get_vocab_size(), dimensions.vocab_size)
    vocab_size = -(-num_tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    last = dimensions.num_layers - 1
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freq_allocation": dimensions.mrope_section[2],
        "hidden_size": dimensions.hidden_size,
        "im_patch_id": tokenizer.token_to_id("<|IMAGE_PLACEHOLDER|>"),
        "intermediate_size": dimensions.intermediate_size,
        "max_position_embeddings": dimensions.max_position_embeddings,
        "mm_vocab_size": 0,
        "model_type": "ernie4_5_moe_vl",
        "moe_gate_act": "softmax",
        "moe_intermediate_size": [dimensions.text_intermediate, dimensions.vision_intermediate],
        "moe_k": dimensions.moe_k,
        "moe_layer_end_index": [dimensions.num_layers, last],
        "moe_layer_interval": 1,
        "moe_layer_start_index": [1, 1],
        "moe_norm_gate_logits": True,
        "moe_num_experts": [dimensions.num_experts] * 2,
        "moe_num_shared_experts": dimensions.num_shared_experts,
        "moe_use_aux_free": True,
        "num_attention_heads": dimensions.num_heads,
        "num_hidden_layers": dimensions.num_layers,
        "num_key_value_heads": dimensions.num_kv_heads,
        "pad_token_id": 0,
        "pixel_hidden_size": dimensions.vision_hidden_size,
        "rms_norm_eps": 1e-05,
        "rope_3d": True,
        "rope_scaling": {"mrope_section": list(dimensions.mrope_section), "type": "default"},
        "rope_theta": 500000,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_bias": False,
        "use_cache": True,
        "use_temporal_conv": True,
        "vision_config": {
            "depth": dimensions.vision_depth,
            "embed_dim": dimensions.vision_hidden_size,
            "hidden_act": "quick_gelu",
            "hidden_size": dimensions.vision_hidden_size,
            "in_channels": 3,
            "mlp_ratio": dimensions.vision_mlp_ratio,
            "model_type": "DFNRope_vision_transformer",
            "num_heads": dimensions.vision_num_heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        "vocab_size": vocab_size,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": 1,
        "eos_token_id": [2, tokenizer.token_to_id("<|end_of_sentence|>")],
        "pad_token_id": 0,
    }


def _preprocessor_config(dimensions: Dimensions) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": dimensions.max_pixels, "shortest_edge": 56 * 56},
        "temporal_conv_size": 2,
    }


def _cut(shapes: dict[str, Shape], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    """Names of each file; a file closes when it has reached `shard_bytes`."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += int(np.prod(shape)) * dtype.itemsize
        if size >= shard_bytes:
            yield names
            names, size = [], 0
    if names:
        yield names


def write_json(file: Path, value: dict[str, Any]) -> None:
    """As all JSON of a checkpoint is written: readable, with a line end."""
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
