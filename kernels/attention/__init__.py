"""Attention of new tokens over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chiasm.kernels.attention import cpu, reference
from chiasm.kernels.attention.segment import Segment

__all__ = ["Segment", "paged_attention"]


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    segments: Sequence[Segment],
) -> torch.Tensor:
    """Attends causally within each segment; see reference.py for the exact statement.

    query [T, heads, d]; key, value [T, kv_heads, d]: the new tokens', stored in the cache already.
    cache [2, slots, kv_heads, d]. Returns [T, heads, d].
    """
    if query.device.type == "cpu":
        return cpu.paged_attention(query, key, value, cache, segments)
    return reference.paged_attention(query, key, value, cache, segments)
