"""One step's tensors: from a schedule's chunks to the model's flat batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from chiasm.model.text import LanguageModel
from chiasm.services.decoder.scheduler import Chunk
from chiasm.types import TOKEN_TEXT, Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """embeddings [T, H]; positions int64 [3, T]; rows per modality present."""

    embeddings: torch.Tensor
    positions: torch.Tensor
    rows: dict[Modality, torch.Tensor]


def build(chunks: Seq[Chunk], model: LanguageModel, device: torch.device) -> StepInput:
    """Lays the chunks one after the other, media embeddings in place of their placeholders."""
    token_ids = [t for c in chunks for t in c.token_ids]
    embeddings = model.embed(torch.tensor(token_ids, device=device))
    row = 0
    for chunk in chunks:
        _place_media(chunk, embeddings[row : row + chunk.num_tokens])
        row += chunk.num_tokens
    is_vision = np.concatenate([_is_vision(c) for c in chunks])
    rows = {
        modality: torch.from_numpy(np.flatnonzero(mask)).to(device)
        for modality, mask in ((Modality.TEXT, ~is_vision), (Modality.VISION, is_vision))
        if mask.any()
    }
    positions = np.concatenate([_positions(c) for c in chunks], axis=1)
    return StepInput(
        embeddings=embeddings,
        positions=torch.from_numpy(positions).to(device),
        rows=rows,
    )


def _is_vision(chunk: Chunk) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """bool [n]; generated tokens are text whatever their id, as in the reference."""
    mask = np.zeros(chunk.num_tokens, dtype=np.bool_)
    types = np.frombuffer(chunk.sequence.prompt_types[chunk.start : chunk.stop], dtype=np.uint8)
    mask[: types.size] = types != TOKEN_TEXT
    return mask


def _positions(chunk: Chunk) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """int64 [3, n]."""
    seq = chunk.sequence
    prompt = seq.positions[:, chunk.start : chunk.stop]
    generated = np.arange(max(chunk.start, seq.num_prompt), chunk.stop) - seq.num_prompt
    rest = np.broadcast_to(seq.next_position + generated, (3, generated.size))
    return np.concatenate([prompt, rest], axis=1)


def _place_media(chunk: Chunk, rows: torch.Tensor) -> None:
    """Writes the part of each item's embeddings that lies in the chunk into its rows [n, H]."""
    for item in chunk.sequence.media:
        first = max(chunk.start, item.offset)
        last = min(chunk.stop, item.offset + item.num_tokens)
        if first < last:
            part = item.embeddings[first - item.offset : last - item.offset]
            rows[first - chunk.start : last - chunk.start] = part.to(rows)
