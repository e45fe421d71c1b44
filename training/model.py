"""The model under training: the modules that serve, with experts that learn.

Language model, vision tower and resampler are the serving classes themselves, so what is trained is
what is served; only the experts and the attention's bookkeeping differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import nn

from chiasm.model.config import ModelConfig
from chiasm.model.geometry import num_tokens
from chiasm.model.moe import MoeBlock
from chiasm.model.resampler import Resampler
from chiasm.model.text import Batch, DecoderLayer, LanguageModel
from chiasm.model.vision import VisionTower
from chiasm.training.attention import CausalSegments
from chiasm.training.data.packing import PackedBatch
from chiasm.training.data.probes import PROBES
from chiasm.training.precision import narrow_linears
from chiasm.training.routing import Recording, RoutingRecord, TrainingExperts
from chiasm.types import TOKEN_TEXT, Grid, Modality


class Part(StrEnum):
    """What a stage may train, as one."""

    TEXT = "text"
    """Embeddings, attention, norms, dense and shared experts, text gates and text experts."""
    VISION_EXPERTS = "vision_experts"
    ADAPTER = "adapter"
    VIT = "vit"
    PROBES = "probes"
    """Linear readers of what is seen; no part of the checkpoint that serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What one pass over a batch gives.

    hidden: [T, H], final and normed. records: of every gate that ran.
    """

    hidden: torch.Tensor
    records: list[RoutingRecord]


def part_of(name: str) -> Part:
    """The part that a parameter of TrainingModel belongs to."""
    if name.startswith("vision."):
        return Part.VIT
    if name.startswith("resampler."):
        return Part.ADAPTER
    if name.startswith("probes."):
        return Part.PROBES
    is_vision_bank = name.startswith(f"experts.banks.{Modality.VISION}_")
    return Part.VISION_EXPERTS if is_vision_bank or name.endswith("gate.weight_1") else Part.TEXT


class TrainingModel(nn.Module):
    """All parameters of a checkpoint, float32, in four modules, and the probes. `dtype` is that of
    products.

    With `shared_pool` there is no isolation of modalities: every token is routed by the text gate
    over the text bank, and there are no vision experts. Such a model has as many experts in its one
    bank as the others in two.
    """

    def __init__(
        self, config: ModelConfig, *, shared_pool: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.shared_pool = config, shared_pool
        self.language = LanguageModel(config.text)
        self.vision = VisionTower(config.vision)
        self.resampler = Resampler(config.vision, config.text)
        modalities = [Modality.TEXT] if shared_pool else list(Modality)
        self.experts = TrainingExperts(config.text, modalities, dtype)
        if dtype is torch.bfloat16:
            for module in (self.language, self.vision, self.resampler):
                narrow_linears(module)
        width = config.text.hidden_size
        self.probes = nn.ModuleDict(
            {
                name: nn.Linear(probe.tokens * width, probe.slots * probe.classes)
                for name, probe in PROBES.items()
            }
        )
        self.media_ids = torch.tensor(sorted({config.tokens.image, config.tokens.video}))

    def moe_blocks(self) -> dict[int, MoeBlock]:
        """The layers that have experts, by index."""
        blocks = {}
        for index, layer in enumerate(self.language.model.layers):
            assert isinstance(layer, DecoderLayer)
            if isinstance(layer.mlp, MoeBlock):
                blocks[index] = layer.mlp
        return blocks

    def gate(self, layer: int, modality: Modality) -> torch.Tensor:
        """The gate of a bank, float32 [H, E]."""
        return self.moe_blocks()[layer].gate.bank(modality)

    def train_only(self, parts: frozenset[Part]) -> None:
        """Freezes the other parts. Correction biases are nobody's: no gradient moves them."""
        for name, parameter in self.named_parameters():
            is_bias = name.endswith("e_score_correction_bias")
            is_unused = self.shared_pool and name.endswith("gate.weight_1")
            parameter.requires_grad_(part_of(name) in parts and not is_bias and not is_unused)
            parameter.grad = None

    def forward(self, batch: PackedBatch) -> Forward:
        """Runs all segments of a batch, each for itself."""
        x = self.language.embed(batch.token_ids)
        if batch.grids:
            rows = torch.isin(batch.token_ids, self.media_ids).nonzero().squeeze(-1)
            x = x.index_copy(0, rows, self.see(batch.pixels, batch.grids))
        experts = Recording(self.experts)
        hidden = self.language(
            x,
            Batch(
                positions=batch.positions,
                rows=self._rows(batch.token_types),
                attention=CausalSegments(batch.lengths),
                experts=experts,
            ),
        )
        return Forward(hidden=hidden, records=experts.records)

    def see(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embeddings of all items in order, [tokens, H].

        The tower attends once per run of frames of equal size, so items go through it by size.
        """
        order = sorted(range(len(grids)), key=lambda i: (grids[i].h * grids[i].w, i))
        items = torch.split(pixels, [grid.num_patches for grid in grids])
        by_size = [grids[i] for i in order]
        features = self.vision(torch.cat([items[i] for i in order]), by_size)
        merged = self.resampler(features, by_size)
        sizes = [num_tokens(grid, self.config.vision) for grid in by_size]
        parts = torch.split(merged, sizes)
        return torch.cat([part for _, part in sorted(zip(order, parts, strict=True), key=_index)])

    def read(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """What every probe that has something to read makes of it: float32 [R, slots, classes]."""
        embeddings = self.see(batch.pixels, batch.grids)
        return {
            name: self.probes[name](embeddings[seen.rows].flatten(1)).view(
                *seen.labels.shape, PROBES[name].classes
            )
            for name, seen in batch.seen.items()
        }

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """float32 [T, V]."""
        return self.language.logits(self(batch).hidden)

    def token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, float32 [N], of the N labels that are not negative.

        hidden: [T, H]. labels: int64 [T], the token that should follow each row.
        """
        rows = (labels >= 0).nonzero().squeeze(-1)
        logits = self.language.logits(hidden.index_select(0, rows))
        return F.cross_entropy(logits, labels[rows], reduction="none")

    def _rows(self, token_types: torch.Tensor) -> dict[Modality, torch.Tensor]:
        is_text = token_types == TOKEN_TEXT
        if self.shared_pool:
            is_text = torch.ones_like(is_text)
        masks = {Modality.TEXT: is_text, Modality.VISION: ~is_text}
        rows = {modality: mask.nonzero().squeeze(-1) for modality, mask in masks.items()}
        return {modality: r for modality, r in rows.items() if len(r)}


def _index(item: tuple[int, torch.Tensor]) -> int:
    return item[0]


@torch.no_grad()
def initialize(model: TrainingModel, seed: int) -> None:
    """Draws all parameters from `seed`.

    Matrices have the standard deviation 1 / sqrt(inputs), which for the published width of 2560 is
    ERNIE's initializer_range, 0.02. Those that write to the residual stream are smaller by
    sqrt(2 * layers) (GPT-2). Norms are one, biases zero.

    Attention of the language model begins as Trockman and Kolter have it (Mimetic Initialization of
    Self-Attention Layers, 2023): queries equal the keys of their group, so a token attends to its
    like, and outputs lean to the transposed values, so a head passes on what it has attended to as
    it is. Look-up by content, which from unrelated matrices comes late or never, is close at hand
    then. Half of the outputs' variance stays random, or the heads of a group would learn the same.
    """
    generator = torch.Generator().manual_seed(seed)
    text = model.config.text
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            is_gate = name.endswith(("gate.weight", "gate.weight_1"))
            std = parameter.shape[0 if is_gate else -1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", ".down")):
                std *= (2 * text.num_layers) ** -0.5
            parameter.normal_(std=std, generator=generator)
    for layer in model.language.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.self_attn
        keys = attention.k_proj.weight.view(text.num_kv_heads, 1, text.head_dim, -1)
        queries = attention.q_proj.weight.view(text.num_kv_heads, -1, *keys.shape[2:])
        queries.copy_(keys.expand_as(queries))
        values = attention.v_proj.weight.view(keys.shape).expand_as(queries)
        attention.o_proj.weight.add_(values.flatten(0, 2).T, alpha=(2 * text.num_layers) ** -0.5)
        attention.o_proj.weight.mul_(0.5**0.5)
