"""Checkpoints of the parity tests: random seeds, every layout, other dimensions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoint.converters import to_paddle, to_transformers
from e2e.reference import FONT
from transformers import (
    AutoTokenizer,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
)

from chiasm.model.synth import synthesize

VIDEO = {
    "draw_on_frames": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12},
}


def hub(directory: Path, seed: int) -> Path:
    """The hub's -PT layout, with a small limit for video frames, which bear their times."""
    synthesize(directory, seed=seed)
    (directory / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    return directory


def native(directory: Path, seed: int) -> Path:
    """transformers' own names, from the hub's layout."""
    to_transformers(hub(directory / "hub", seed), directory / "native", save_original_format=False)
    return _with_small_videos(directory / "native")


def paddle(directory: Path, seed: int) -> Path:
    """The -Paddle layout; the reference reads the hub's twin beside it."""
    source = hub(directory / "hub", seed)
    to_paddle(source, directory / "paddle")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / "paddle" / name).write_bytes((source / name).read_bytes())
    return directory / "paddle"


def saved(directory: Path, seed: int) -> Path:
    """A model that transformers made and saved by itself: 8 experts, top 3, other widths."""
    tokenizer = AutoTokenizer.from_pretrained(hub(directory / "hub", seed))
    ids = {
        f"{kind.lower()}{part.lower()}_token_id": tokenizer.convert_tokens_to_ids(
            f"<|{kind}{part or '_PLACEHOLDER'}|>"
        )
        for kind in ("IMAGE", "VIDEO")
        for part in ("", "_START", "_END")
    }
    config = Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": 600,
            "hidden_size": 96,
            "intermediate_size": 144,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "moe_intermediate_size": [56, 24],
            "moe_k": 3,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [3, 3, 2],
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 3, "hidden_size": 48, "num_heads": 3, "intermediate_size": 96},
        tie_word_embeddings=True,
        **ids,
    )
    model = _randomised(config, seed)
    model.save_pretrained(directory / "saved")
    Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessor(
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 60}
        ),
        tokenizer=tokenizer,
        video_processor=Ernie4_5_VLMoeVideoProcessor(**VIDEO, font=FONT),
    ).save_pretrained(directory / "saved")
    return directory / "saved"


def _randomised(config: Any, seed: int) -> Any:
    """Every tensor matters, and logits are spread well apart."""
    torch.manual_seed(seed)
    model: Any = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "e_score_correction_bias" in name:
                p.copy_(torch.randn_like(p) * 0.05)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            else:
                scale = 0.3 if "gate.weight" in name else p.shape[-1] ** -0.5
                p.copy_(torch.randn_like(p) * scale)
    return model


def _with_small_videos(directory: Path) -> Path:
    path = directory / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] |= VIDEO | {"font": Path(FONT).name}
    shutil.copy(FONT, directory)
    path.write_text(json.dumps(settings))
    return directory
