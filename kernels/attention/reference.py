"""Paged attention in plain torch; the specification of every other implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chiasm.kernels.attention.segment import Segment


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    segments: Sequence[Segment],
) -> torch.Tensor:
    """For every segment, softmax(q k^T / sqrt(d)) v over the sequence's tokens up to each query.

    Query head h uses kv head h // (heads / kv_heads). Scores and softmax are float32; the weights
    are cast to the query's dtype, as in transformers' `eager_attention_forward`. Shapes as in
    `kernels.attention.paged_attention`; `key` and `value` are not read, the cache holds them.
    """
    out = torch.empty_like(query)
    group = query.shape[1] // cache.shape[2]
    for segment in segments:
        slots = torch.cat([torch.arange(*piece) for piece in segment.pieces(segment.stop)])
        keys, values = cache[:, slots.to(cache.device)].repeat_interleave(group, dim=2)
        rows = slice(segment.row, segment.row + segment.num_tokens)
        scores = torch.einsum("qhd,khd->hqk", query[rows], keys) * query.shape[-1] ** -0.5
        visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device)
        scores = scores.float().masked_fill(~visible.tril(segment.start), float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values)
    return out
