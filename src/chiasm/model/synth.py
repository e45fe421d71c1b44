"""Synthetic checkpoints: random weights in the hub's -PT layout, small enough for a laptop.

Every structural feature of the published model is on, and every tensor differs from its neutral
value, so that a part left out or swapped shows in the output. Each tensor is drawn from its own
generator, seeded by name: the same seed gives the same bytes, whatever the order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from chiasm.errors import InvalidArgument
from chiasm.model import synth_tokenizer
from chiasm.model.config import ModelConfig
from chiasm.model.shapes import Shape, tensor_shapes

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_VOCAB_MULTIPLE = 64
# Chosen so that greedy answers wander over many words with clear margins, while float32 noise stays
# near 1e-5 of a logit: sharper attention makes livelier answers and less certain arithmetic.
_EMBEDDING_STD = 0.25
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "down_proj": 1.5}
_FP32_SUFFIXES = (".mlp.gate.weight", ".mlp.gate.weight_1", ".e_score_correction_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Dimensions of a synthetic model; names as in TextConfig and VisionConfig."""

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


PRESETS = {
    "tiny": Preset(
        num_bpe_tokens=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(6, 6, 4),
        max_position_embeddings=4096,
        moe_k=4,
        num_experts=16,
        text_intermediate=64,
        vision_intermediate=32,
        num_shared_experts=2,
        vision_depth=2,
        vision_hidden_size=64,
        vision_num_heads=4,
        vision_mlp_ratio=4,
        max_pixels=28 * 28 * 1024,
        shard_bytes=2 << 20,
    ),
}


def synthesize(
    directory: Path, *, preset: str | Preset = "tiny", seed: int = 0, dtype: str = "bfloat16"
) -> None:
    """Writes a random checkpoint with configuration and tokenizer into `directory`.

    `preset` is a name of PRESETS or dimensions of one's own. Weights are bfloat16 values stored as
    `dtype`; routers and their biases are float32, as published. Raises InvalidArgument for an
    unknown preset or dtype and for a directory that is not empty.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InvalidArgument("preset", f"{preset!r} is none of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if dtype not in _DTYPES:
        raise InvalidArgument("dtype", f"{dtype!r} is none of {', '.join(_DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidArgument("directory", f"{directory} exists and is not an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = synth_tokenizer.train(preset.num_bpe_tokens)
    synth_tokenizer.write_tokenizer(
        tokenizer, directory, model_max_length=preset.max_position_embeddings
    )
    _write_json(directory / "config.json", _config(preset, tokenizer, dtype))
    _write_json(directory / "generation_config.json", _generation_config(tokenizer))
    _write_json(directory / "preprocessor_config.json", _preprocessor_config(preset))
    _write_weights(directory, preset, seed, dtype, synth_tokenizer.readable_ids(tokenizer))


def _config(preset: Preset, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json with the hub's flat keys."""
    vocab_size = -(-tokenizer.get_vocab_size() // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    last = preset.num_layers - 1
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freq_allocation": preset.mrope_section[2],
        "hidden_size": preset.hidden_size,
        "im_patch_id": tokenizer.token_to_id("<|IMAGE_PLACEHOLDER|>"),
        "intermediate_size": preset.intermediate_size,
        "max_position_embeddings": preset.max_position_embeddings,
        "mm_vocab_size": 0,
        "model_type": "ernie4_5_moe_vl",
        "moe_gate_act": "softmax",
        "moe_intermediate_size": [preset.text_intermediate, preset.vision_intermediate],
        "moe_k": preset.moe_k,
        "moe_layer_end_index": [preset.num_layers, last],
        "moe_layer_interval": 1,
        "moe_layer_start_index": [1, 1],
        "moe_norm_gate_logits": True,
        "moe_num_experts": [preset.num_experts] * 2,
        "moe_num_shared_experts": preset.num_shared_experts,
        "moe_use_aux_free": True,
        "num_attention_heads": preset.num_heads,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_kv_heads,
        "pad_token_id": 0,
        "pixel_hidden_size": preset.vision_hidden_size,
        "rms_norm_eps": 1e-05,
        "rope_3d": True,
        "rope_scaling": {"mrope_section": list(preset.mrope_section), "type": "default"},
        "rope_theta": 500000,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_bias": False,
        "use_cache": True,
        "use_temporal_conv": True,
        "vision_config": {
            "depth": preset.vision_depth,
            "embed_dim": preset.vision_hidden_size,
            "hidden_act": "quick_gelu",
            "hidden_size": preset.vision_hidden_size,
            "in_channels": 3,
            "mlp_ratio": preset.vision_mlp_ratio,
            "model_type": "DFNRope_vision_transformer",
            "num_heads": preset.vision_num_heads,
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


def _preprocessor_config(preset: Preset) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": preset.max_pixels,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_conv_size": 2,
    }


def _write_weights(
    directory: Path, preset: Preset, seed: int, dtype: str, readable: list[int]
) -> None:
    shapes = tensor_shapes(ModelConfig.load(directory))
    shards = list(_cut(shapes, _DTYPES[dtype], preset.shard_bytes))
    weight_map, total_size = {}, 0
    for number, names in enumerate(shards, start=1):
        tensors = {}
        for name in names:
            tensor = torch.from_numpy(_draw(name, shapes[name], seed, readable))
            if not name.endswith(_FP32_SUFFIXES):
                tensor = tensor.to(torch.bfloat16).to(_DTYPES[dtype])
            tensors[name] = tensor
            total_size += tensor.nbytes
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes it private; a pool's user reads it too
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


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


def _draw(name: str, shape: Shape, seed: int, readable: list[int]) -> np.ndarray[Any, Any]:
    """float32 values of one tensor.

    Scales keep activations near one. Embeddings of tokens that are no readable text are small: as
    the embedding is the head as well, answers are made of words.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    values = generator.standard_normal(shape, dtype=np.float32)
    if name == "model.embed_tokens.weight":
        unread = np.ones(shape[0], dtype=bool)
        unread[readable] = False
        values[unread] *= 0.1
        return values * np.float32(_EMBEDDING_STD)
    if name.endswith("e_score_correction_bias"):
        return values * np.float32(1 / shape[1])
    if name.endswith(".bias"):
        return values * np.float32(0.1)
    if len(shape) == 1:
        return 1 + values * np.float32(0.1)
    fan_in = shape[0] if name.endswith(_FP32_SUFFIXES) else shape[1]
    gain = next((g for part, g in _GAINS.items() if part in name), 1.0)
    return values * np.float32(gain * fan_in**-0.5)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
