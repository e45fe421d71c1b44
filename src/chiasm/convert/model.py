"""The whole model in this process, from a checkpoint in any precision, without services."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.load import load_module
from chiasm.model.moe import Dispatch, Partial
from chiasm.model.resampler import Resampler
from chiasm.model.text import Batch, LanguageModel
from chiasm.model.vision import VisionTower
from chiasm.training.attention import CausalSegments
from chiasm.training.data.packing import PackedBatch
from chiasm.types import Modality


@dataclass(frozen=True, slots=True)
class _Answer:
    partials: Sequence[Partial]

    def result(self) -> Sequence[Partial]:
        return self.partials


class _Experts:
    """Both banks, each as one shard. `on_dispatch` sees what goes in."""

    def __init__(
        self, banks: dict[Modality, ExpertBank], on_dispatch: Callable[[Dispatch], None]
    ) -> None:
        self._banks, self._on_dispatch = banks, on_dispatch

    def begin(self, dispatch: Dispatch) -> _Answer:
        self._on_dispatch(dispatch)
        return _Answer(self._banks[dispatch.modality].answer(dispatch))


class WholeModel:
    """Language model, vision tower, resampler and both banks of experts."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        """Raises what reading a checkpoint raises."""
        self.config = config = ModelConfig.load(directory)
        with torch.device("meta"):
            self._language = LanguageModel(config.text)
            self._vision = VisionTower(config.vision)
            self._resampler = Resampler(config.vision, config.text)
        self.banks: dict[Modality, ExpertBank] = {}
        with Checkpoint(directory, config) as checkpoint:
            load_module(self._language, checkpoint, "", dtype)
            load_module(self._vision, checkpoint, "vision_model.", dtype)
            load_module(self._resampler, checkpoint, "model.resampler_model.", dtype)
            for modality in Modality:
                bank = ExpertBank(
                    config,
                    modality=modality,
                    num_shards=1,
                    dtype=dtype,
                    device=torch.device("cpu"),
                )
                bank.load(checkpoint, 0)
                self.banks[modality] = bank

    @torch.inference_mode()
    def logits(
        self, batch: PackedBatch, on_dispatch: Callable[[Dispatch], None] = lambda _: None
    ) -> torch.Tensor:
        """float32 [T, V], each segment of the batch for itself."""
        x = self._language.embed(batch.token_ids)
        if batch.grids:
            media = torch.isin(batch.token_ids, self._media_ids())
            pixels = batch.pixels.to(x.dtype)
            x[media] = self._resampler(self._vision(pixels, batch.grids), batch.grids)
        rows = {
            Modality.TEXT: (batch.token_types == 0).nonzero().squeeze(-1),
            Modality.VISION: (batch.token_types > 0).nonzero().squeeze(-1),
        }
        hidden = self._language(
            x,
            Batch(
                positions=batch.positions,
                rows={modality: r for modality, r in rows.items() if len(r)},
                attention=CausalSegments(batch.lengths),
                experts=_Experts(self.banks, on_dispatch),
            ),
        )
        return self._language.logits(hidden)

    def _media_ids(self) -> torch.Tensor:
        return torch.tensor(sorted({self.config.tokens.image, self.config.tokens.video}))
