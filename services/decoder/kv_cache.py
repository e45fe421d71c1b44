"""Keys and values of all sequences, in blocks that the scheduler hands out."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from chiasm.kernels.attention import Segment, paged_attention, prepare
from chiasm.model.config import TextConfig
from chiasm.services.decoder.blocks import BlockPool, BlockTable


class Placed(NamedTuple):
    """Tokens [start, start + num_tokens) of the sequence with this block table."""

    table: BlockTable
    start: int
    num_tokens: int


class PagedKVCache:
    """Per layer [2, slots, kv_heads, d]: keys, then values. Block b is slots [b*size, (b+1)*size).

    On a CPU the system commits the memory as slots are first written.
    """

    def __init__(
        self,
        config: TextConfig,
        blocks: BlockPool,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self._group = config.num_heads // config.num_kv_heads
        shape = (2, blocks.num_blocks * blocks.block_size, config.num_kv_heads, config.head_dim)
        self._layers = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]

    def bind(self, placed: Seq[Placed]) -> PagedAttention:
        """The attention context of one step; the batch's rows are in the order of `placed`."""
        size, row, segments, slots = self.blocks.block_size, 0, [], []
        for table, start, num_tokens in placed:
            runs = tuple((first * size, count * size) for first, count in table.runs)
            segments.append(Segment(row=row, start=start, num_tokens=num_tokens, runs=runs))
            tokens = np.arange(start, start + num_tokens)
            blocks = np.array(table.blocks[start // size : (start + num_tokens - 1) // size + 1])
            slots.append(blocks[tokens // size - start // size] * size + tokens % size)
            row += num_tokens
        device = self._layers[0].device
        return PagedAttention(
            self._layers,
            segments,
            slots=torch.from_numpy(np.concatenate(slots)).to(device),
            group=self._group,
        )


class PagedAttention:
    """Attention of a step's segments over their own histories; a model.text.AttentionContext."""

    def __init__(
        self,
        layers: Seq[torch.Tensor],
        segments: Seq[Segment],
        *,
        slots: torch.Tensor,
        group: int,
    ) -> None:
        self._layers, self._segments, self._slots = layers, segments, slots
        self._metadata = prepare(segments, slots.device, group=group)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        cache = self._layers[layer]
        cache[0].index_copy_(0, self._slots, key)
        cache[1].index_copy_(0, self._slots, value)
        return paged_attention(query, key, value, cache, self._segments, self._metadata)
