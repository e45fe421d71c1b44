"""Keys and values of running sequences, one contiguous block per sequence.

The engine sees two things: reservations, and `bind`, which turns a step's chunks into an
AttentionContext. A paged cache takes the place of this one behind the same two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from chiasm import errors
from chiasm.model.config import TextConfig


class Segment(NamedTuple):
    """Rows [row, row + num_tokens) of a flat batch are tokens [start, ...) of one sequence."""

    sequence_id: int
    row: int
    start: int
    num_tokens: int


class ContiguousKVCache:
    """At most `num_tokens` tokens over all sequences; memory is touched only as tokens arrive."""

    def __init__(
        self, config: TextConfig, *, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self.num_tokens, self.num_reserved = num_tokens, 0
        self._blocks: dict[int, torch.Tensor] = {}  # [layers, 2, kv_heads, capacity, d]

    def can_reserve(self, num_tokens: int) -> bool:
        return self.num_reserved + num_tokens <= self.num_tokens

    def reserve(self, sequence_id: int, num_tokens: int) -> None:
        """Sets room for `num_tokens` aside. Raises ResourceExhausted when there is none."""
        if not self.can_reserve(num_tokens):
            raise errors.ResourceExhausted("the KV cache is full", retry_after_s=1.0)
        c = self._config
        shape = (c.num_layers, 2, c.num_kv_heads, num_tokens, c.head_dim)
        self._blocks[sequence_id] = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.num_reserved += num_tokens

    def release(self, sequence_id: int) -> None:
        """Frees a sequence's room."""
        self.num_reserved -= self._blocks.pop(sequence_id).shape[3]

    def bind(self, segments: Sequence[Segment]) -> CachedAttention:
        """The attention context of one step."""
        return CachedAttention([(s, self._blocks[s.sequence_id]) for s in segments])


class CachedAttention:
    """Attention of a step's segments over their own histories; a model.text.AttentionContext."""

    def __init__(self, segments: list[tuple[Segment, torch.Tensor]]) -> None:
        self._segments = segments

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for segment, block in self._segments:
            rows = slice(segment.row, segment.row + segment.num_tokens)
            stop = segment.start + segment.num_tokens
            keys, values = block[layer]  # [kv_heads, capacity, d]
            keys[:, segment.start : stop] = key[rows].transpose(0, 1)
            values[:, segment.start : stop] = value[rows].transpose(0, 1)
            out[rows] = _attend(query[rows], keys[:, :stop], values[:, :stop], segment.start)
        return out


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """query [n, heads, d] at positions start.. over keys and values [kv_heads, start + n, d]."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, total, _ = keys.shape
    group = num_heads // num_kv_heads
    if num_tokens == 1:
        # The heads of a group become queries of their kv head: the history is not copied.
        grouped = query.view(num_kv_heads, group, head_dim)
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None])
        return out.reshape(1, num_heads, head_dim)
    keys, values = (x.repeat_interleave(group, dim=0)[None] for x in (keys, values))
    mask = None
    if start:
        mask = torch.ones(num_tokens, total, dtype=torch.bool, device=query.device).tril(start)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None
    )
    return out[0].transpose(0, 1)
