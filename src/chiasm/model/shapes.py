"""Canonical tensor names (those of the hub's -PT checkpoints) and their shapes.

Linear weights are [out, in] as in PyTorch; the two router weights alone are [H, E]. Layer l's
routed experts are numbered through: 0..E-1 text, E..2E-1 vision.
"""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.model.config import ModelConfig, TextConfig, VisionConfig
from chiasm.types import Modality

Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every tensor that a complete checkpoint of `config` holds, by canonical name."""
    return dict(_text_tensors(config.text)) | dict(_vision_tensors(config))


def expert_prefix(text: TextConfig, layer: int, modality: Modality, expert: int) -> str:
    """Canonical prefix of a routed expert; `expert` counts within its bank."""
    offset = 0 if modality is Modality.TEXT else text.num_experts
    return f"model.layers.{layer}.mlp.experts.{offset + expert}."


def _text_tensors(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    hidden = text.hidden_size
    yield "model.embed_tokens.weight", (text.vocab_size, hidden)
    if not text.tie_word_embeddings:
        yield "lm_head.weight", (text.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(text.num_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (text.num_heads * text.head_dim, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (text.num_kv_heads * text.head_dim, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (text.num_kv_heads * text.head_dim, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, text.num_heads * text.head_dim)
        if text.sparse_layers[layer]:
            yield from _moe_tensors(text, layer)
        else:
            yield from _swiglu(f"{prefix}mlp.", hidden, text.intermediate_size)


def _moe_tensors(text: TextConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    prefix = f"model.layers.{layer}.mlp."
    yield f"{prefix}gate.weight", (text.hidden_size, text.num_experts)
    yield f"{prefix}gate.weight_1", (text.hidden_size, text.num_experts)
    yield f"{prefix}moe_statics.e_score_correction_bias", (2, text.num_experts)
    if text.shared_intermediate:
        yield from _swiglu(f"{prefix}shared_experts.", text.hidden_size, text.shared_intermediate)
    for modality in Modality:
        for expert in range(text.num_experts):
            yield from _swiglu(
                expert_prefix(text, layer, modality, expert),
                text.hidden_size,
                text.expert_intermediate(modality),
            )


def _swiglu(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}up_proj.weight", (intermediate, hidden)
    yield f"{prefix}down_proj.weight", (hidden, intermediate)


def _vision_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    hidden = vision.hidden_size
    patch = vision.in_channels * vision.patch_size**2
    yield "vision_model.patch_embed.proj.weight", (hidden, patch)
    for block in range(vision.depth):
        prefix = f"vision_model.blocks.{block}."
        yield from _layer_norm(f"{prefix}norm1.", hidden)
        yield from _layer_norm(f"{prefix}norm2.", hidden)
        yield from _linear(f"{prefix}attn.qkv.", 3 * hidden, hidden)
        yield from _linear(f"{prefix}attn.proj.", hidden, hidden)
        yield from _linear(f"{prefix}mlp.fc1.", vision.intermediate_size, hidden)
        yield from _linear(f"{prefix}mlp.fc2.", hidden, vision.intermediate_size)
    yield from _layer_norm("vision_model.ln.", hidden)
    yield from _resampler_tensors(vision, config.text.hidden_size)


def _resampler_tensors(vision: VisionConfig, out: int) -> Iterator[tuple[str, Shape]]:
    prefix = "model.resampler_model."
    merged = vision.hidden_size * vision.spatial_merge_size**2
    for stage, width in (("spatial", merged), ("temporal", merged * vision.temporal_merge_size)):
        yield from _linear(f"{prefix}{stage}_linear.0.", merged, width)
        yield from _linear(f"{prefix}{stage}_linear.2.", merged, merged)
        yield from _layer_norm(f"{prefix}{stage}_linear.3.", merged)
    yield from _linear(f"{prefix}mlp.", out, merged)
    yield f"{prefix}after_norm.weight", (out,)


def _linear(prefix: str, out: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}weight", (out, width)
    yield f"{prefix}bias", (out,)


def _layer_norm(prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}weight", (width,)
    yield f"{prefix}bias", (width,)
