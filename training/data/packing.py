"""Examples joined to one flat batch without padding.

Tokens of all examples stand in one row. Attention must not cross from one example to another;
positions start anew in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from chiasm.errors import InvalidArgument
from chiasm.training.data.encode import Encoder, Example
from chiasm.training.data.probes import PROBES
from chiasm.training.data.stream import Stream
from chiasm.types import Grid

NO_LABEL = -100
"""Cross-entropy's own mark of rows to leave out."""

_PREFETCHED = 8
_BATCH_TIMEOUT_S = 120.0


class Seen(NamedTuple):
    """What a probe is to read in R runs of embeddings.

    rows: int64 [R, tokens], the probe's tokens as rows of all the batch's embeddings. labels: int64
    [R, slots].
    """

    rows: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """T tokens of several examples.

    token_ids: int64 [T]. token_types: uint8 [T], 0 text, 1 image, 2 video. positions: int64 [3, T],
    rows T, H, W. labels: int64 [T], the token that should follow each row, NO_LABEL where it does
    not matter. lengths: tokens of each example. pixels: float32 [N, 588], of the media in order of
    their placeholders. tasks: the task of each example. seen: what there is to read, by probe.
    """

    token_ids: Tensor
    token_types: Tensor
    positions: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    pixels: Tensor
    grids: tuple[Grid, ...]
    tasks: tuple[str, ...]
    seen: Mapping[str, Seen]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_examples(self) -> int:
        return len(self.lengths)


def pack(examples: Sequence[Example], max_tokens: int) -> PackedBatch:
    """Joins examples in order. Raises InvalidArgument for none, and for more than `max_tokens`."""
    lengths = tuple(example.num_tokens for example in examples)
    if not examples:
        raise InvalidArgument("examples", "is empty")
    if sum(lengths) > max_tokens:
        raise InvalidArgument("examples", f"have {sum(lengths)} tokens, limit {max_tokens}")
    return PackedBatch(
        token_ids=torch.cat([example.token_ids for example in examples]),
        token_types=torch.cat([example.token_types for example in examples]),
        positions=torch.cat([example.positions for example in examples], dim=1),
        labels=torch.cat([_labels(example) for example in examples]),
        lengths=lengths,
        pixels=torch.cat([example.pixels for example in examples]),
        grids=tuple(grid for example in examples for grid in example.grids),
        tasks=tuple(example.task for example in examples),
        seen=_seen(examples),
    )


def grouped(examples: Iterable[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Examples in order, in groups each as full as that allows; one that alone exceeds `max_tokens`
    is a group of its own."""
    waiting: list[Example] = []
    num_tokens = 0
    for example in examples:
        if waiting and num_tokens + example.num_tokens > max_tokens:
            yield waiting
            waiting, num_tokens = [], 0
        waiting.append(example)
        num_tokens += example.num_tokens
    if waiting:
        yield waiting


def packed(examples: Iterable[Example], max_tokens: int) -> Iterator[PackedBatch]:
    """Examples in order, in batches each as full as that allows.

    Raises InvalidArgument for one that alone exceeds `max_tokens`.
    """
    for group in grouped(examples, max_tokens):
        yield pack(group, max_tokens)


def _seen(examples: Sequence[Example]) -> dict[str, Seen]:
    """By probe; embeddings of all examples follow one another as their media do."""
    found: dict[str, list[Seen]] = {}
    start = 0
    for example in examples:
        end = start + example.num_embeddings
        for name, labels in example.shows.items():
            probe = PROBES[name]
            rows = torch.arange(start, end).view(-1, probe.tokens)
            found.setdefault(name, []).append(
                Seen(rows, torch.tensor(labels).view(len(rows), probe.slots))
            )
        start = end
    return {
        name: Seen(torch.cat([part.rows for part in parts]), torch.cat([p.labels for p in parts]))
        for name, parts in found.items()
    }


def _labels(example: Example) -> Tensor:
    """Each row's next token; the last row has none."""
    labels = torch.full_like(example.token_ids, NO_LABEL)
    learnt = example.labels_mask[1:]
    labels[:-1][learnt] = example.token_ids[1:][learnt]
    return labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Batches of a stream, each as full as the order of samples allows.

    `start` is the first sample's index; that of a batch's first sample plus its `num_examples` is
    where the next one begins, and where a resumed run has to start.
    """

    stream: Stream
    checkpoint: Path
    """Directory with config and tokenizer."""
    max_tokens: int
    start: int = 0

    def __iter__(self) -> Iterator[PackedBatch]:
        """Without end. Raises InvalidArgument for a sample that alone exceeds `max_tokens`."""
        encoder = Encoder.load(self.checkpoint)
        return packed(map(encoder.encode, self.stream.samples(self.start)), self.max_tokens)

    def in_background(self) -> Iterator[PackedBatch]:
        """The same batches, made ahead by one other process, which ends with this one."""
        loader = DataLoader(
            _Dataset(self),
            batch_size=None,
            num_workers=1,
            multiprocessing_context="fork",  # samples draw with closures, which none could send
            prefetch_factor=_PREFETCHED,
            collate_fn=_as_it_is,
            timeout=_BATCH_TIMEOUT_S,
        )
        return cast("Iterator[PackedBatch]", iter(loader))


class _Dataset(IterableDataset[PackedBatch]):
    """Batches, as torch's loader wants them."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._batches)


def _as_it_is(batch: Any) -> Any:
    return batch
