"""A sample as the model gets it, laid out by the code that serves.

Template, tokenizer, layout, positions and pixels are those of `chiasm.model`; only the answer and
the token that ends it are added, as generation would add them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chiasm.errors import InvalidArgument
from chiasm.model.chat import Tokens, render_chat
from chiasm.model.config import ModelConfig
from chiasm.model.geometry import num_tokens, smart_resize
from chiasm.model.layout import lay_out_pieces
from chiasm.model.patches import Patches, normalize, patchify, resize
from chiasm.model.positions import position_ids
from chiasm.model.processing import ProcessingConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.training.data.probes import Labels
from chiasm.training.data.sample import Clip, Media, Sample
from chiasm.types import Grid

END_OF_ANSWER = "<|end_of_sentence|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation with its answer.

    token_ids: int64 [T]. token_types: uint8 [T], 0 text, 1 image, 2 video. positions: int64 [3, T],
    rows T, H, W. labels_mask: bool [T], true for the tokens to be learnt: the answer and its end.
    pixels: float32 [N, 588]. shows: the sample's own labels for probes.
    """

    task: str
    token_ids: Tensor
    token_types: Tensor
    positions: Tensor
    labels_mask: Tensor
    pixels: Tensor
    grids: tuple[Grid, ...]
    shows: Labels
    num_embeddings: int
    """Of its media."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Encoder:
    """Encodes samples for one checkpoint's tokenizer and sizes."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, processing: ProcessingConfig
    ) -> None:
        end = tokenizer.token_id(END_OF_ANSWER)
        if end is None:
            raise InvalidArgument("tokenizer", f"has no {END_OF_ANSWER}")
        self._config, self._tokenizer, self._processing = config, tokenizer, processing
        self._end = end

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        """For a checkpoint's directory; weights are not needed. Raises chiasm.errors."""
        config = ModelConfig.load(directory)
        processing = ProcessingConfig.load(directory, config)
        return cls(config, Tokenizer.load(directory), processing)

    def encode(self, sample: Sample) -> Example:
        """Lays out the conversation and what is to follow it."""
        patches = [self._patches(item) for item in sample.media]
        grids = tuple(item.grid for item in patches)
        prompt = render_chat(sample.messages, self._tokenizer, self._config)
        answer = Tokens((*self._tokenizer.encode(sample.answer), self._end))
        laid_out = lay_out_pieces([*prompt, answer], grids, self._config)
        positions, _ = position_ids(laid_out.num_tokens, laid_out.media, self._config)
        labels_mask = torch.zeros(laid_out.num_tokens, dtype=torch.bool)
        labels_mask[-len(answer.ids) :] = True
        row = 3 * self._processing.patch_size**2
        return Example(
            task=sample.task,
            token_ids=torch.tensor(laid_out.token_ids),
            token_types=torch.tensor(list(laid_out.token_types), dtype=torch.uint8),
            positions=torch.from_numpy(positions),
            labels_mask=labels_mask,
            pixels=torch.cat([item.pixels for item in patches]) if patches else torch.empty(0, row),
            grids=grids,
            shows=sample.shows,
            num_embeddings=sum(num_tokens(grid, self._config.vision) for grid in grids),
        )

    def _patches(self, item: Media) -> Patches:
        """What serving makes of a file of these pixels, without the file."""
        processing = self._processing
        is_clip = isinstance(item, Clip)
        frames = item.frames if isinstance(item, Clip) else item.pixels[None]
        settings = processing.video.pixels if is_clip else processing.image
        patch_size, merge_size = processing.patch_size, processing.spatial_merge_size
        size = smart_resize(*frames.shape[1:3], factor=processing.factor, pixels=settings)
        rows = [
            patchify(resize(image, *size), patch_size=patch_size, merge_size=merge_size)
            for image in torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
        ]
        if is_clip:
            rows += rows[-1:] * (-len(rows) % processing.temporal_merge_size)
        grid = Grid(len(rows), size[0] // patch_size, size[1] // patch_size)
        return Patches(pixels=normalize(torch.cat(rows), settings), grid=grid)
