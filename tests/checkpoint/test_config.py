"""ModelConfig from the three shapes of config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Ernie4_5_VLMoeConfig

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.config import ModelConfig
from chiasm.types import Modality

# The published 28B-A3B dimensions in the hub's spelling.
PUBLISHED: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "torch_dtype": "bfloat16",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_3d": True,
    "freq_allocation": 20,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "max_position_embeddings": 131072,
    "use_bias": False,
    "tie_word_embeddings": True,
    "moe_gate_act": "softmax",
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "im_patch_id": 100295,
    "mm_vocab_size": 0,
    "pixel_hidden_size": 1280,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "use_temporal_conv": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_act": "quick_gelu",
        "hidden_size": 1280,
        "in_channels": 3,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
}


def write(directory: Path, config: dict[str, Any], **others: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in {"config": config, **others}.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def test_published_dimensions(tmp_path: Path) -> None:
    config = ModelConfig.load(write(tmp_path / "ERNIE", PUBLISHED))
    assert (config.name, config.layout, config.dtype) == ("ERNIE", "hub", "bfloat16")
    assert config.video_advance == "original"
    text = config.text
    assert text.head_dim == 128
    assert text.mrope_section == (22, 22, 20)
    assert text.moe_layers == tuple(range(1, 28))
    assert text.shared_intermediate == 3072
    assert [text.expert_intermediate(m) for m in Modality] == [1536, 512]
    assert config.vision.intermediate_size == 5120
    tokens = config.tokens
    assert (tokens.image, tokens.video) == (100295, 100295)
    assert (tokens.image_start, tokens.image_end) == (101304, 101305)
    assert (tokens.video_start, tokens.video_end) == (101306, 101307)
    assert (tokens.bos, tokens.eos, tokens.pad) == (1, (2,), 0)


def test_transformers_defaults_are_the_published_model(tmp_path: Path) -> None:
    Ernie4_5_VLMoeConfig().save_pretrained(tmp_path / "native")
    native = ModelConfig.load(tmp_path / "native")
    flat = ModelConfig.load(write(tmp_path / "flat", PUBLISHED))
    assert native.text == flat.text
    assert native.vision == flat.vision
    assert native.tokens.video == 103367
    assert (native.layout, native.video_advance) == ("transformers", "transformers")


def test_paddle_config_may_lack_keys(tmp_path: Path) -> None:
    lacking = {"torch_dtype", "max_position_embeddings", "im_patch_id", "rope_scaling"}
    paddle = {key: value for key, value in PUBLISHED.items() if key not in lacking}
    config = ModelConfig.load(write(tmp_path / "paddle", paddle))
    full = ModelConfig.load(write(tmp_path / "full", PUBLISHED))
    assert config.layout == "paddle"
    assert config.dtype == "bfloat16"
    assert (config.text, config.vision, config.tokens) == (full.text, full.vision, full.tokens)


def test_converted_configs_agree(hub: Path, converted: Path) -> None:
    ours, theirs = ModelConfig.load(hub), ModelConfig.load(converted)
    if not converted.name.startswith("transformers"):
        theirs_positions = theirs.text.max_position_embeddings
        assert theirs_positions == 131072  # the -Paddle config does not say
    else:
        assert theirs.text == ours.text
        assert theirs.dtype == ours.dtype
        assert theirs.tokens.video != theirs.tokens.image
    assert theirs.vision == ours.vision
    assert theirs.text.mrope_section == ours.text.mrope_section
    assert theirs.tokens.image == ours.tokens.image
    assert theirs.tokens.eos == ours.tokens.eos


def test_video_advance_is_overridable(tiny_checkpoint: Path) -> None:
    assert ModelConfig.load(tiny_checkpoint).video_advance == "original"
    assert ModelConfig.load(tiny_checkpoint, "transformers").video_advance == "transformers"
    with pytest.raises(InvalidArgument, match="video_advance"):
        ModelConfig.load(tiny_checkpoint, "sideways")


@pytest.mark.parametrize(
    ("start", "end", "interval", "expected"),
    [
        ([1, 1], [27, 27], 1, (1, 2, 3, 4, 5)),
        ([3, 2], [3, 4], 1, (2, 3, 4)),
        (0, -1, 2, (1, 3, 5)),
    ],
)
def test_sparse_layers(
    tmp_path: Path, start: object, end: object, interval: int, expected: tuple[int, ...]
) -> None:
    change = {
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
        "num_hidden_layers": 6,
    }
    config = ModelConfig.load(write(tmp_path, PUBLISHED | change))
    assert config.text.moe_layers == expected


def test_mlp_layer_types(tmp_path: Path) -> None:
    kinds = ["dense", "sparse", "dense", "sparse"]
    native = Ernie4_5_VLMoeConfig(text_config={"num_hidden_layers": 4, "mlp_layer_types": kinds})
    native.save_pretrained(tmp_path)
    assert ModelConfig.load(tmp_path).text.moe_layers == (1, 3)


def test_generation_config_comes_first(tmp_path: Path) -> None:
    config = PUBLISHED | {"eos_token_id": 7, "bos_token_id": 6, "pad_token_id": 5}
    generation = {"eos_token_id": [2, 100272], "pad_token_id": 3}
    tokens = ModelConfig.load(write(tmp_path, config, generation_config=generation)).tokens
    assert (tokens.eos, tokens.bos, tokens.pad) == ((2, 100272), 6, 3)


SPELLINGS = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens", {s: 50 + i for i, s in enumerate(SPELLINGS)}),
        (
            "tokenizer_config",
            {
                "added_tokens_decoder": {
                    str(50 + i): {"content": s} for i, s in enumerate(SPELLINGS)
                }
            },
        ),
        (
            "tokenizer",
            {"added_tokens": [{"id": 50 + i, "content": s} for i, s in enumerate(SPELLINGS)]},
        ),
    ],
)
def test_ids_from_tokenizer_files(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    config = PUBLISHED | {"vocab_size": 64, "im_patch_id": 49}
    tokens = ModelConfig.load(write(tmp_path, config, **{file: content})).tokens
    assert (tokens.image_start, tokens.image_end) == (50, 51)
    assert (tokens.video_start, tokens.video_end) == (52, 53)
    assert tokens.video == tokens.image == 49


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2561}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act"),
        ({"moe_group_experts": True}, "moe_group_experts"),
        ({"use_bias": True}, "use_bias"),
        ({"mm_vocab_size": 100}, "mm_vocab_size"),
        ({"rope_scaling": {"mrope_section": [22, 22, 22]}}, "rope_scaling:mrope_section"),
        ({"rope_scaling": {"mrope_section": [24, 20, 20]}}, "rope_scaling:mrope_section"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling:type"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"moe_num_experts": [64, 32]}, "moe_num_experts"),
        ({"moe_num_experts": 10**6}, "moe_num_experts"),
        ({"moe_k": 65}, "moe_k"),
        ({"moe_intermediate_size": [1536]}, "moe_intermediate_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
        ({"im_patch_id": 103424}, "im_patch_id"),
        ({"eos_token_id": [2, 200000]}, "eos_token_id"),
        ({"vocab_size": 101000}, "image_start_token_id"),
        ({"model_type": "llama"}, "model_type"),
        ({"pixel_hidden_size": 1024}, "pixel_hidden_size"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config:hidden_act"),
        ({"vision_config": {"num_heads": 3}}, "vision_config:num_heads"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ModelConfig.load(write(tmp_path, PUBLISHED | change))
    assert refusal.value.field == f"config.json:{field}"


def test_files_that_are_no_json_objects(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        ModelConfig.load(tmp_path)
    for content in ("{", "[]", '"text"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InvalidArgument, match=r"config\.json"):
            ModelConfig.load(tmp_path)


def test_needs_no_torch() -> None:
    code = "import sys, chiasm.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
