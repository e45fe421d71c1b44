"""Small models under training, random batches for them, and the serving path to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.geometry import num_tokens
from chiasm.model.load import load_module
from chiasm.model.moe import Dispatch, Partial
from chiasm.model.resampler import Resampler
from chiasm.model.text import Batch, LanguageModel
from chiasm.model.vision import VisionTower
from chiasm.training.data import tokenizer
from chiasm.training.data.packing import NO_LABEL, PackedBatch
from chiasm.training.export import describe
from chiasm.training.gradients import one_core_each
from chiasm.training.model import TrainingModel, initialize
from chiasm.training.presets import Preset, Stage, find
from chiasm.types import Grid, Modality


def short_preset(*steps: int, ablation: str | None = None) -> Preset:
    """The smoke preset with its first stages, of so many steps each."""
    preset = find("smoke", ablation)
    stages = tuple(
        _shortened(stage, n) for stage, n in zip(preset.stages[: len(steps)], steps, strict=True)
    )
    return replace(preset, stages=stages)


def _shortened(stage: Stage, steps: int) -> Stage:
    return replace(stage, batch_tokens=160, schedule=replace(stage.schedule, steps=steps))


def new_model(
    directory: Path, preset: Preset, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> TrainingModel:
    """A model whose every tensor differs from its neutral value; its description in `directory`."""
    config = describe(directory, preset.dimensions, tokenizer.train(), dtype="float32")
    model = TrainingModel(config, shared_pool=preset.shared_pool, dtype=dtype)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.dim() == 1 else 0.02
            parameter.add_(noise, alpha=scale)
    return model


def random_batch(
    config: ModelConfig, segments: Sequence[tuple[int, Sequence[Grid]]], seed: int = 0
) -> PackedBatch:
    """Segments of (text tokens, media): half of the text, the media, the other half."""
    generator = torch.Generator().manual_seed(seed)
    ids, types, lengths = [], [], []
    grids: list[Grid] = []
    for num_text, media in segments:
        text = torch.randint(3, 259, (num_text,), generator=generator)
        places = sum(num_tokens(grid, config.vision) for grid in media)
        half = num_text // 2
        placeholders = torch.full((places,), config.tokens.image)
        ids.append(torch.cat((text[:half], placeholders, text[half:])))
        types.append(torch.tensor([0] * half + [1] * places + [0] * (num_text - half)))
        lengths.append(num_text + places)
        grids += media
    token_ids = torch.cat(ids)
    is_text = torch.cat(types) == 0
    labels = torch.where(is_text, token_ids.roll(-1), NO_LABEL)
    num_patches = sum(grid.num_patches for grid in grids)
    return PackedBatch(
        token_ids=token_ids,
        token_types=torch.cat(types).to(torch.uint8),
        positions=torch.randint(0, 40, (3, len(token_ids)), generator=generator),
        labels=labels,
        lengths=tuple(lengths),
        pixels=torch.randn(num_patches, 588, generator=generator),
        grids=tuple(grids),
        tasks=("",) * len(lengths),
        seen={},
    )


class DenseCausal:
    """One sequence's attention, written out."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)


@dataclass(frozen=True)
class ServedExperts:
    """Expert banks as the pools hold them."""

    banks: dict[Modality, ExpertBank]

    def begin(self, dispatch: Dispatch) -> ServedAnswer:
        return ServedAnswer(self.banks[dispatch.modality].answer(dispatch))


@dataclass(frozen=True)
class ServedAnswer:
    partials: list[Partial]

    def result(self) -> list[Partial]:
        return self.partials


@torch.no_grad()
def served_logits(
    directory: Path, batch: PackedBatch, dtype: torch.dtype = torch.float32, *, num_shards: int = 4
) -> torch.Tensor:
    """Logits [T, V] of a batch's segments, one by one, from a checkpoint as services load it."""
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        language = LanguageModel(config.text)
        vision, resampler = VisionTower(config.vision), Resampler(config.vision, config.text)
    banks = {}
    with Checkpoint(directory, config) as checkpoint:
        load_module(language, checkpoint, "", dtype)
        load_module(vision, checkpoint, "vision_model.", dtype)
        load_module(resampler, checkpoint, "model.resampler_model.", dtype)
        for modality in Modality:
            bank = ExpertBank(
                config,
                modality=modality,
                num_shards=num_shards,
                dtype=dtype,
                device=torch.device("cpu"),
            )
            for shard in range(num_shards):
                bank.load(checkpoint, shard)
            banks[modality] = bank
    with one_core_each(1):  # the products are too small to share
        return _logits(language, vision, resampler, ServedExperts(banks), batch)


def _logits(
    language: LanguageModel,
    vision: VisionTower,
    resampler: Resampler,
    experts: ServedExperts,
    batch: PackedBatch,
) -> torch.Tensor:
    x = language.embed(batch.token_ids)
    if batch.grids:
        x[batch.token_types > 0] = resampler(vision(batch.pixels, batch.grids), batch.grids)
    found, start = [], 0
    for length in batch.lengths:
        own = slice(start, start + length)
        types = batch.token_types[own]
        masks = {Modality.TEXT: types == 0, Modality.VISION: types > 0}
        rows = {modality: mask.nonzero().squeeze(-1) for modality, mask in masks.items()}
        inputs = Batch(
            positions=batch.positions[:, own],
            rows={modality: r for modality, r in rows.items() if len(r)},
            attention=DenseCausal(),
            experts=experts,
        )
        found.append(language.logits(language(x[own], inputs)))
        start += length
    return torch.cat(found)
