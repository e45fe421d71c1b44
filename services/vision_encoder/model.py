"""The encoder's model: preprocessing, ViT and resampler behind the engine's four calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import nn

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.geometry import image_grid, num_tokens, video_grid
from chiasm.model.images import read_image
from chiasm.model.load import load_module
from chiasm.model.patches import RawPatches
from chiasm.model.probe import VideoLimits, probe_image, probe_video
from chiasm.model.processing import ProcessingConfig
from chiasm.model.resampler import Resampler
from chiasm.model.video import read_video
from chiasm.model.vision import VisionTower
from chiasm.services.vision_encoder.config import EncoderSettings
from chiasm.services.vision_encoder.domain import Plan
from chiasm.telemetry.progress import loading
from chiasm.types import Grid, MediaKind


class VisionModel:
    """Weights on one device. Implements the engine's MediaModel."""

    def __init__(
        self,
        tower: VisionTower,
        resampler: Resampler,
        processing: ProcessingConfig,
        *,
        max_pixels: int,
        max_batch_patches: int,
    ) -> None:
        self._tower, self._resampler, self._processing = tower, resampler, processing
        self._max_pixels, self._max_batch_patches = max_pixels, max_batch_patches
        self._video_limits = VideoLimits.beside_images(max_pixels)
        self._weight = resampler.after_norm.weight

    @classmethod
    def load(cls, settings: EncoderSettings) -> VisionModel:
        """Reads the encoder's part of a checkpoint. Raises ChiasmError that says what is wrong."""
        config = ModelConfig.load(settings.model)
        with torch.device("meta"):
            tower, resampler = VisionTower(config.vision), Resampler(config.vision, config.text)
        modules: dict[str, nn.Module] = {
            "vision_model.": tower,
            "model.resampler_model.": resampler,
        }
        total = sum(p.numel() for module in modules.values() for p in module.parameters())
        with (
            Checkpoint(settings.model, config) as checkpoint,
            loading("vision encoder", total) as advance,
        ):
            for prefix, module in modules.items():
                load_module(
                    module,
                    checkpoint,
                    prefix,
                    getattr(torch, settings.dtype),
                    device=settings.device,
                    on_parameter=advance,
                )
        return cls(
            tower,
            resampler,
            ProcessingConfig.load(settings.model, config),
            max_pixels=settings.max_image_pixels,
            max_batch_patches=settings.max_batch_patches,
        )

    def plan(self, file: BinaryIO, kind: MediaKind) -> Plan:
        """What the header alone tells. Raises InvalidArgument.

        Frames that are going to be turned have the grid's rows and columns the other way round.
        """
        if kind is MediaKind.IMAGE:
            width, height = probe_image(file, max_pixels=self._max_pixels)
            return Plan(image_grid(width, height, self._processing), is_exact=True)
        info = probe_video(file, self._video_limits)
        grid = video_grid(info.num_frames, info.fps, info.width, info.height, self._processing)
        return Plan(grid, is_exact=info.num_frames is not None)

    def embedding_bytes(self, grid: Grid) -> int:
        """Size of an item's embeddings."""
        return num_tokens(grid, self._tower.config) * self._weight.nbytes

    def preprocess(
        self, file: BinaryIO, kind: MediaKind, on_frame: Callable[[], None]
    ) -> RawPatches:
        """Decodes, resizes and patches. Raises InvalidArgument, and what `on_frame` raises."""
        if kind is MediaKind.IMAGE:
            return read_image(file, self._processing, max_pixels=self._max_pixels)
        limits = self._video_limits
        return read_video(file, self._processing, limits=limits, on_frame=on_frame)

    @torch.inference_mode()
    def embed(self, patches: RawPatches) -> torch.Tensor:
        """Embeddings [tokens, text_hidden] on the CPU, in the model's dtype.

        A long video takes several passes of whole frame pairs: no frame attends to another, and the
        resampler joins pairs only. Only the patches of a pass are normalised at a time.
        """
        t, h, w = patches.grid
        pair = self._resampler.temporal_merge_size
        step = max(self._max_batch_patches // (pair * h * w), 1) * pair
        parts = []
        for start in range(0, t, step):
            grid = Grid(min(step, t - start), h, w)
            first = start * h * w
            pixels = patches.rows(first, first + grid.num_patches, self._weight.device)
            parts.append(self._resampler(self._tower(pixels, [grid]), [grid]).cpu())
        return torch.cat(parts)
