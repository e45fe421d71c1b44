"""What a checkpoint directory says about its model, in one spelling.

Three config.json shapes are read: the hub's flat one (-PT), its -Paddle sister (flat, some keys
missing) and the nested one of transformers. This module is the only place that knows their key
names. It needs no torch, so the gateway may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chiasm.model import quantization
from chiasm.model.quantization import Quantization
from chiasm.model.section import Section
from chiasm.model.token_ids import TokenIds, read_token_ids
from chiasm.types import Modality

__all__ = ["ModelConfig", "TextConfig", "TokenIds", "VisionConfig"]

Layout = Literal["hub", "transformers", "paddle"]
VideoAdvance = Literal["original", "transformers"]
Dtype = Literal["float32", "bfloat16"]

_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16"}
_ADVANCES: dict[str, VideoAdvance] = {"original": "original", "transformers": "transformers"}
# Nonsense in a config must not cost memory: every tensor's name is listed from these.
_MAX_LAYERS, _MAX_EXPERTS = 256, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Dimensions of the decoder. Banks have the same number of experts, of different widths."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of a dense layer's SwiGLU."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Rotary pairs of the axes H, W, T; their sum is head_dim / 2."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    sparse_layers: tuple[bool, ...]
    """Per layer: True where it has experts, False where it is dense."""
    moe_k: int
    num_experts: int
    """Experts of one bank."""
    text_intermediate: int
    vision_intermediate: int
    shared_intermediate: int
    """Width of the fused shared experts: their number x text_intermediate; 0 when none."""
    norm_min: float
    """Floor of the sum that expert weights are divided by."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, ascending."""
        return tuple(layer for layer, sparse in enumerate(self.sparse_layers) if sparse)

    def expert_intermediate(self, modality: Modality) -> int:
        """Width of one routed expert of the bank."""
        return self.text_intermediate if modality is Modality.TEXT else self.vision_intermediate


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Dimensions of the ViT and of the resampler's two merges."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    in_channels: int
    spatial_merge_size: int
    temporal_merge_size: int
    layer_norm_eps: float
    rope_theta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything a service must know of a checkpoint before it reads weights."""

    name: str
    """The directory's name."""
    text: TextConfig
    vision: VisionConfig
    tokens: TokenIds
    layout: Layout
    """Shape of config.json; transformers writes hub tensor names beside a nested one."""
    dtype: Dtype
    video_advance: VideoAdvance
    """A video moves the next position by its longest axis, or by its longest side in space."""
    quantization: Quantization
    """How the routed experts are stored."""

    @classmethod
    def load(cls, directory: Path, video_advance: str | None = None) -> ModelConfig:
        """Reads config.json, generation_config.json and the tokenizer's added tokens.

        `video_advance` overrides the default, which is `transformers` for a nested config and
        `original` for the others. Raises NotFound without config.json, InvalidArgument with the
        file and key of whatever is missing, nonsensical or not supported.
        """
        root = Section.load(directory / "config.json")
        if not str(root.values.get("model_type", "ernie4_5")).startswith("ernie4_5"):
            raise root.error("model_type", f"{root.values['model_type']!r} is not ERNIE-4.5-VL")
        nested = root.has("text_config")
        text = _nested_text(root) if nested else _flat_text(root)
        advance = video_advance or ("transformers" if nested else "original")
        if advance not in _ADVANCES:
            raise root.error("video_advance", f"must be original or transformers, not {advance!r}")
        return cls(
            name=directory.resolve().name,
            text=text,
            vision=_nested_vision(root) if nested else _flat_vision(root),
            tokens=read_token_ids(directory, root, vocab_size=text.vocab_size),
            layout=_layout(root),
            dtype=_dtype(root),
            video_advance=_ADVANCES[advance],
            quantization=quantization.read(root, text.num_layers),
        )


def _layout(root: Section) -> Layout:
    if root.has("text_config"):
        return "transformers"
    # The -Paddle config.json differs from the hub's other one by what it lacks.
    return "hub" if root.has("torch_dtype") else "paddle"


def _dtype(root: Section) -> Dtype:
    sections = (root, root.section("text_config"))
    stored = [s.values[k] for s in sections for k in ("dtype", "torch_dtype") if s.has(k)]
    name = str(stored[0]).removeprefix("torch.") if stored else "bfloat16"
    if name not in _DTYPES:
        raise root.error("torch_dtype", f"must be float32 or bfloat16, not {name!r}")
    return _DTYPES[name]


def _nested_text(root: Section) -> TextConfig:
    text = root.section("text_config")
    tied = root.boolean("tie_word_embeddings", text.boolean("tie_word_embeddings", True))
    kinds = text.values.get("mlp_layer_types")
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (_num_layers(text) - 1)
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"dense", "sparse"}:
        raise text.error("mlp_layer_types", "must list dense or sparse for every layer")
    rope = text.section("rope_parameters")
    # transformers leaves the published section unsaid.
    rope = Section(rope.path, {"mrope_section": [22, 22, 20], **rope.values})
    return _text(text, rope, tuple(kind == "sparse" for kind in kinds), tied)


def _flat_text(root: Section) -> TextConfig:
    for key, supported in (
        ("moe_gate_act", "softmax"),
        ("moe_norm_gate_logits", True),
        ("moe_group_experts", False),
        ("mm_vocab_size", 0),
        ("rope_3d", True),
    ):
        root.require(key, supported)
    num_layers = _num_layers(root)
    start = min(root.integers("moe_layer_start_index", [1], low=0))
    end = max(root.integers("moe_layer_end_index", [num_layers - 1], low=-1))
    interval = root.integer("moe_layer_interval", 1)
    last = num_layers - 1 if end < 0 else end
    sparse = tuple(
        (layer + 1) % interval == 0 and start <= layer <= last for layer in range(num_layers)
    )
    rope = root.section("rope_scaling")
    rope = Section(rope.path, {"rope_theta": root.number("rope_theta", 500000.0), **rope.values})
    return _text(root, rope, sparse, root.boolean("tie_word_embeddings", True))


def _text(text: Section, rope: Section, sparse: tuple[bool, ...], tied: bool) -> TextConfig:
    """Keys that both shapes spell alike; `text` is the object that holds them."""
    text.require("hidden_act", "silu")
    text.require("use_bias", False)
    num_layers, num_experts = _num_layers(text), _num_experts(text)
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    if len(sparse) != num_layers:
        raise text.error("mlp_layer_types", f"has {len(sparse)} entries for {num_layers} layers")
    if not text.has("head_dim") and hidden % heads:
        raise text.error("hidden_size", f"{hidden} does not divide by {heads} heads")
    head_dim = text.integer("head_dim", hidden // heads)
    kv_heads = text.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise text.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    widths = text.integers("moe_intermediate_size")
    if len(widths) != 2:
        raise text.error("moe_intermediate_size", "must be [text width, vision width]")
    return TextConfig(
        vocab_size=text.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=text.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        rope_theta=rope.number("rope_theta", 500000.0),
        mrope_section=_mrope_section(text, rope, head_dim),
        max_position_embeddings=text.integer("max_position_embeddings", 131072),
        tie_word_embeddings=tied,
        sparse_layers=sparse,
        moe_k=text.integer("moe_k", high=num_experts),
        num_experts=num_experts,
        text_intermediate=widths[0],
        vision_intermediate=widths[1],
        shared_intermediate=text.integer("moe_num_shared_experts", 0, low=0) * widths[0],
        norm_min=text.number("moe_norm_min", 1e-12),
    )


def _num_layers(text: Section) -> int:
    return text.integer("num_hidden_layers", high=_MAX_LAYERS)


def _num_experts(text: Section) -> int:
    """Experts of one bank; the flat shape lists both banks, the nested one gives one number."""
    banks = set(text.integers("moe_num_experts"))
    if len(banks) != 1:
        raise text.error("moe_num_experts", f"banks must be of one size, not {sorted(banks)}")
    num_experts = banks.pop()
    if num_experts > _MAX_EXPERTS:
        raise text.error("moe_num_experts", f"must be at most {_MAX_EXPERTS}, not {num_experts}")
    return num_experts


def _mrope_section(text: Section, rope: Section, head_dim: int) -> tuple[int, int, int]:
    for key in ("rope_type", "type"):
        rope.require(key, "default")
    if head_dim % 2:
        raise text.error("head_dim", f"must be even, not {head_dim}")
    pairs = head_dim // 2
    if rope.has("mrope_section"):
        section = rope.integers("mrope_section", low=0)
    else:  # the original spelling: T's share of the pairs; H and W halve the rest
        t = text.integer("freq_allocation", low=0)
        section = [(pairs - t) // 2, (pairs - t) // 2, t]
    if len(section) != 3 or sum(section) != pairs or section[0] != section[1]:
        raise rope.error(
            "mrope_section", f"must be [n, n, t] with the sum {pairs} (head_dim / 2), not {section}"
        )
    return section[0], section[1], section[2]


def _nested_vision(root: Section) -> VisionConfig:
    vision = root.section("vision_config")
    return _vision(
        vision,
        hidden_size=vision.integer("hidden_size", 1280),
        intermediate_size=vision.integer("intermediate_size", 5120),
        spatial=vision.integer("spatial_merge_size", 2),
        temporal=vision.integer("temporal_merge_size", 2),
    )


def _flat_vision(root: Section) -> VisionConfig:
    vision = root.section("vision_config")
    root.require("use_temporal_conv", True)
    hidden_size = vision.integer("embed_dim", vision.integer("hidden_size", 1280))
    if root.integer("pixel_hidden_size", hidden_size) != hidden_size:
        raise root.error("pixel_hidden_size", f"must equal embed_dim, {hidden_size}")
    return _vision(
        vision,
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * vision.number("mlp_ratio", 4)),
        spatial=root.integer("spatial_conv_size", vision.integer("spatial_merge_size", 2)),
        temporal=root.integer("temporal_conv_size", 2),
    )


def _vision(
    vision: Section, *, hidden_size: int, intermediate_size: int, spatial: int, temporal: int
) -> VisionConfig:
    vision.require("hidden_act", "quick_gelu")
    num_heads = vision.integer("num_heads", 16)
    if hidden_size % (4 * num_heads):  # rows and columns turn a quarter of a head's pairs each
        raise vision.error("num_heads", f"{hidden_size} / {num_heads} is not a multiple of 4")
    patch_size = set(vision.integers("patch_size", [14]))
    if len(patch_size) != 1:
        raise vision.error("patch_size", "patches must be square")
    return VisionConfig(
        depth=vision.integer("depth", 32, high=_MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=intermediate_size,
        patch_size=patch_size.pop(),
        in_channels=vision.integer("in_channels", 3),
        spatial_merge_size=spatial,
        temporal_merge_size=temporal,
        layer_norm_eps=vision.number("rms_norm_eps", 1e-6),
        rope_theta=vision.section("rope_parameters").number("rope_theta", 10000.0),
    )
