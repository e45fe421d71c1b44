"""Synthetic checkpoints: random weights in the hub's -PT layout, small enough for a laptop.

Every structural feature of the published model is on, and every tensor differs from its neutral
value, so that a part left out or swapped shows in the output. Each tensor is drawn from its own
generator, seeded by name: the same seed gives the same bytes, whatever the order.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant import int8
from chiasm.model import dense_weights, quantization, synth_tokenizer
from chiasm.model.config import ModelConfig
from chiasm.model.quantization import STORED, WRITTEN, WRITTEN_DENSE, Quantization
from chiasm.model.shapes import Shape
from chiasm.model.stream import Layout, SafetensorsStream
from chiasm.model.synth_experts import uniform, write_experts
from chiasm.model.writer import (
    DTYPES,
    FP32_SUFFIXES,
    Dimensions,
    write_description,
    write_json,
    write_weights,
)

# Chosen so that greedy answers wander over many words with clear margins, while float32 noise stays
# near 1e-5 of a logit: sharper attention makes livelier answers and less certain arithmetic.
_EMBEDDING_STD = 0.25
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "down_proj": 1.5}

PRESETS = {
    "tiny": Dimensions(
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
    "ernie-4.5-vl-28b-a3b": Dimensions(
        num_bpe_tokens=512,
        vocab_size=103424,
        hidden_size=2560,
        intermediate_size=12288,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
        mrope_section=(22, 22, 20),
        max_position_embeddings=131072,
        moe_k=6,
        num_experts=64,
        text_intermediate=1536,
        vision_intermediate=512,
        num_shared_experts=2,
        vision_depth=32,
        vision_hidden_size=1280,
        vision_num_heads=16,
        vision_mlp_ratio=4,
        max_pixels=28 * 28 * 6177,
        shard_bytes=1 << 30,
    ),
}


def find(name: str) -> Dimensions:
    """Those of a preset. Raises InvalidArgument for an unknown one."""
    if name not in PRESETS:
        raise InvalidArgument("preset", f"{name!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


def synthesize(
    directory: Path,
    *,
    preset: str | Dimensions = "tiny",
    seed: int = 0,
    dtype: str = "bfloat16",
    experts: str = STORED,
    dense: str = STORED,
) -> None:
    """Writes a random checkpoint with configuration and tokenizer into `directory`.

    `preset` is a name of PRESETS or dimensions of one's own. Weights are bfloat16 values stored as
    `dtype`; routers and their biases are float32, as published. `experts` is the precision of the
    routed ones, `dense` of the language model's other matrices: STORED is `dtype` too. Raises
    InvalidArgument, before anything is written, for an unknown preset, dtype or precision, for
    dimensions that no model may have and for a directory that is not empty.
    """
    preset = find(preset) if isinstance(preset, str) else preset
    if dtype not in DTYPES:
        raise InvalidArgument("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    if experts not in (STORED, *WRITTEN):
        raise InvalidArgument("experts", f"{experts!r} is none of {STORED}, {', '.join(WRITTEN)}")
    if dense not in (STORED, *WRITTEN_DENSE):
        raise InvalidArgument("dense", f"{dense!r} is none of {STORED}, {', '.join(WRITTEN_DENSE)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidArgument("directory", f"{directory} exists and is not an empty directory")
    tokenizer = synth_tokenizer.train(preset.num_bpe_tokens)
    with tempfile.TemporaryDirectory() as trial:  # a model that may not be leaves no folder
        write_description(Path(trial), preset, tokenizer, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    config = write_description(directory, preset, tokenizer, dtype=dtype)
    readable = synth_tokenizer.readable_ids(tokenizer)
    config = _in_low_precision(directory, config, replace(uniform(config, experts), dense=dense))

    def drawn(name: str, shape: Shape) -> torch.Tensor:
        return _rounded(name, _draw(name, shape, seed, readable))

    written = write_experts(directory, config, seed=seed, gain=_gain)
    if dense != STORED:
        written |= _write_dense(directory, config, drawn)
    names = {name for layout in written.values() for name in layout}
    write_weights(
        directory,
        config,
        drawn,
        shard_bytes=preset.shard_bytes,
        is_wanted=lambda name: (
            experts == STORED
            if ".mlp.experts." in name
            else f"{name.removesuffix('.weight')}.codes" not in names
        ),
        written=written,
    )


def _in_low_precision(directory: Path, config: ModelConfig, given: Quantization) -> ModelConfig:
    """Says so in config.json; returns the configuration as it is then."""
    if given.is_stored:
        return config
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values[quantization.KEY] = given.block()
    write_json(file, values)
    return ModelConfig.load(directory)


def _write_dense(
    directory: Path, config: ModelConfig, drawn: Callable[[str, Shape], torch.Tensor]
) -> dict[str, Layout]:
    """Writes the language model's matrices in int8; returns what each file holds."""
    written: dict[str, Layout] = {}
    for layer, shapes in dense_weights.by_layer(config.text).items():
        file, layout = dense_weights.file_name(layer), dense_weights.layout(shapes)
        with SafetensorsStream(directory / file, layout) as stream:
            for name, shape in shapes.items():
                coded = int8.encode(drawn(f"{name}.weight", shape)[None])
                stream.add(f"{name}.codes", coded.codes[0])
                stream.add(f"{name}.scale", coded.scale[0])
        written[file] = layout
    return written


def _rounded(name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
    """The values as bfloat16 holds them, whatever they are stored as; float32 for routers."""
    tensor = torch.from_numpy(values)
    return tensor if name.endswith(FP32_SUFFIXES) else tensor.to(torch.bfloat16)


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
    fan_in = shape[0] if name.endswith(FP32_SUFFIXES) else shape[1]
    return values * np.float32(_gain(name) * fan_in**-0.5)


def _gain(name: str) -> float:
    return next((gain for part, gain in _GAINS.items() if part in name), 1.0)
