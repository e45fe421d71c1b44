"""Our hub-layout checkpoints in the other layouts, and as transformers models: the judge's side.

Nothing here uses chiasm: configurations and tensor names are converted independently of the code
under test.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
)

_TOKENS = {
    f"{kind.lower()}{suffix}_token_id": f"<|{kind}_{name}|>"
    for kind in ("IMAGE", "VIDEO")
    for suffix, name in (("", "PLACEHOLDER"), ("_start", "START"), ("_end", "END"))
}
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "use_bias",
    "moe_intermediate_size",
    "moe_k",
    "moe_num_shared_experts",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_UNTRANSPOSED = ("embed_tokens.weight", "mlp.gate.weight", "mlp.gate.weight_1", "_bias")


def reference_model(
    directory: Path, dtype: torch.dtype = torch.float32
) -> Any:  # transformers' own annotations are not strict
    """transformers' Ernie4_5_VLMoeForConditionalGeneration of a checkpoint; eval mode, eager.

    The checkpoint is in the hub's or in transformers' layout. The model's video_token_id is that of
    <|VIDEO_PLACEHOLDER|>, also where our flat config gives videos the image placeholder.
    """
    directory = directory.resolve()
    config = json.loads((directory / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        if "text_config" not in config:
            for file in directory.glob("*.safetensors*"):
                (Path(scratch) / file.name).symlink_to(file)
            (Path(scratch) / "config.json").write_text(json.dumps(_nested(directory, config)))
            directory = Path(scratch)
        model: Any = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def to_transformers(directory: Path, out: Path, *, save_original_format: bool) -> Any:
    """Saves the checkpoint as transformers does, processor included, and returns its model.

    The tensors get hub-like names or, if not `save_original_format`, transformers' own.
    """
    dtype = json.loads((directory / "config.json").read_text())["torch_dtype"]
    model = reference_model(directory, getattr(torch, dtype))
    model.save_pretrained(out, save_original_format=save_original_format)
    processor = Ernie4_5_VLMoeProcessor(  # type: ignore[no-untyped-call]  # transformers' own
        image_processor=Ernie4_5_VLMoeImageProcessor(),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        video_processor=Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
    )
    processor.save_pretrained(out)
    generation = "generation_config.json"
    (out / generation).write_bytes((directory / generation).read_bytes())
    return model


def to_paddle(directory: Path, out: Path, *, fused: bool = True) -> None:
    """Writes the -Paddle layout: transposed Linears, and projections fused or apart."""
    config = json.loads((directory / "config.json").read_text())
    for key in ("torch_dtype", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        del config[key]
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(file))
    tensors = {
        name: t.t() if t.ndim == 2 and not name.endswith(_UNTRANSPOSED) else t
        for name, t in stored.items()
    }
    if fused:
        for name in [n for n in tensors if n.endswith("q_proj.weight")]:
            parts = [tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
            tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts, dim=1)
        for name in [n for n in tensors if n.endswith("gate_proj.weight")]:
            parts = [tensors.pop(n) for n in (name, name.replace("gate_proj", "up_proj"))]
            tensors[name.replace("gate_proj", "up_gate_proj")] = torch.cat(parts, dim=1)
        tensors = {
            "ernie." + name.removeprefix("model.") if name.startswith("model.") else name: t
            for name, t in tensors.items()
        }
    out.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (out / name).write_bytes((directory / name).read_bytes())


def _nested(directory: Path, flat: dict[str, Any]) -> dict[str, Any]:
    """transformers' nested config.json of a flat one."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first, last = min(flat["moe_layer_start_index"]), max(flat["moe_layer_end_index"])
    text = {key: flat[key] for key in _TEXT_KEYS} | {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": flat["moe_num_experts"][0],
        "mlp_layer_types": [
            "sparse" if first <= layer <= last else "dense"
            for layer in range(flat["num_hidden_layers"])
        ],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(flat["rope_theta"]),
            "mrope_section": flat["rope_scaling"]["mrope_section"],
        },
    }
    vit = flat["vision_config"]
    vision = {
        key: vit[key] for key in ("depth", "hidden_act", "num_heads", "in_channels", "patch_size")
    } | {
        "model_type": "ernie4_5_vl_moe_vision",
        "hidden_size": vit["embed_dim"],
        "intermediate_size": vit["embed_dim"] * vit["mlp_ratio"],
        "spatial_merge_size": flat["spatial_conv_size"],
        "temporal_merge_size": flat["temporal_conv_size"],
        "rms_norm_eps": 1e-6,
    }
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": flat["tie_word_embeddings"],
        **{key: added[spelling] for key, spelling in _TOKENS.items()},
    }


def reference_last_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits [V] after a long text prompt."""
    reference = reference_model(directory)
    reference.set_attn_implementation("sdpa")  # eager would hold every pair's score at once
    with torch.inference_mode():
        logits: torch.Tensor = reference(
            input_ids=torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            logits_to_keep=1,
        ).logits
    return logits[0, -1]
