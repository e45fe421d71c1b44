"""Models that transformers makes and saves by itself, in other dimensions, load as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.shapes import tensor_shapes
from chiasm.types import Modality

# One differs from the published model where the other does not: untied head, no shared experts,
# explicit head_dim, dense layers in between.
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "moe_intermediate_size": [40, 24],
        "moe_num_experts": 6,
        "moe_num_shared_experts": 0,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "tied": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "moe_intermediate_size": [64, 64],
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [5, 5, 6]},
    },
}
TOKENS: dict[str, Any] = dict.fromkeys(
    ("image_token_id", "image_start_token_id", "image_end_token_id"), 9
)
VIDEO_TOKENS: dict[str, Any] = dict.fromkeys(
    ("video_token_id", "video_start_token_id", "video_end_token_id"), 8
)


@pytest.fixture(scope="module", params=list(VARIANTS))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path]:
    """(model, its directory with hub-like names, its directory with native names)."""
    text = {"vocab_size": 72, "moe_k": 2} | VARIANTS[request.param]
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    tied: dict[str, Any] = {"tie_word_embeddings": text["tie_word_embeddings"]}
    torch.manual_seed(11)
    config = Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, **TOKENS, **VIDEO_TOKENS, **tied
    )
    model: Any = Ernie4_5_VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory / "hub")
    model.save_pretrained(directory / "native", save_original_format=False, max_shard_size="40KB")
    assert (directory / "native" / "model.safetensors.index.json").is_file()
    return model, directory / "hub", directory / "native"


def test_both_formats_hold_the_same_tensors(saved: tuple[Any, Path, Path]) -> None:
    _, hub, native = saved
    configs = [ModelConfig.load(directory) for directory in (hub, native)]
    assert configs[0].text == configs[1].text
    with Checkpoint(hub, configs[0]) as one, Checkpoint(native, configs[1]) as other:
        for name in tensor_shapes(configs[0]):
            assert torch.equal(one.get(name), other.get(name)), name
        assert one.bytes_read == other.bytes_read


def test_tensors_are_the_models_own(saved: tuple[Any, Path, Path]) -> None:
    model, *directories = saved
    for directory in directories:
        config = ModelConfig.load(directory)
        with Checkpoint(directory, config) as checkpoint:
            language = model.model.language_model
            for layer in config.text.moe_layers:
                moe = language.layers[layer].mlp
                for modality in Modality:
                    bank = getattr(moe, f"{modality}_moe")
                    for expert in range(config.text.num_experts):
                        gate_up, down = checkpoint.expert(layer, modality, expert)
                        assert torch.equal(gate_up, bank.experts.gate_up_proj[expert])
                        assert torch.equal(down, bank.experts.down_proj[expert])
                mlp = f"model.layers.{layer}.mlp."
                assert torch.equal(
                    checkpoint.get(f"{mlp}gate.weight").t(), moe.text_moe.gate.weight
                )
                assert torch.equal(
                    checkpoint.get(f"{mlp}gate.weight_1").t(), moe.vision_moe.gate.weight
                )
            assert checkpoint.has("lm_head.weight") is not config.text.tie_word_embeddings
            if not config.text.tie_word_embeddings:
                assert torch.equal(checkpoint.get("lm_head.weight"), model.lm_head.weight)
            resampler = model.model.resampler_model
            assert torch.equal(
                checkpoint.get("model.resampler_model.temporal_linear.3.weight"),
                resampler.temporal_linear.ln.weight,
            )
