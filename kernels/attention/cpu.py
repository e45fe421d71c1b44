"""Paged attention on a CPU: reads every run of the history in place, copies none of it.

Single bfloat16 tokens take a kernel of their own (single.py). For all others
a segment's history is split at the ends of its runs. torch's flash kernel answers each piece with
its output and log-sum-exp, which combine exactly (Dao et al. 2022, arXiv:2205.14135, section 3.1).
Only a segment's own tokens need a causal mask; what lies before them is visible to all of them, so
the heads of a group stand as further queries of their kv head and the history is not expanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from chiasm.kernels.attention.segment import Segment
from chiasm.kernels.attention.single import Singles, attend, is_readable

Part = tuple[torch.Tensor, torch.Tensor]
"""Output [kv_heads, group, n, d] and log-sum-exp float32 [kv_heads, group, n] of some keys."""


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    segments: Sequence[Segment],
    singles: Singles | None = None,
) -> torch.Tensor:
    """See kernels.attention.paged_attention. singles: of the segments, where they are known."""
    query = query.contiguous()
    out = torch.empty_like(query)
    if is_readable(query, cache):
        attend(query, cache, singles or Singles.of(segments), out)
        segments = [segment for segment in segments if segment.num_tokens > 1]
    keys, values = cache
    for segment in segments:
        rows = slice(segment.row, segment.row + segment.num_tokens)
        if segment.num_tokens == 1:
            # One query sees everything, itself included: no mask, and mostly one piece.
            parts = list(_history(query[rows], keys, values, segment, segment.stop))
        else:
            parts = list(_history(query[rows], keys, values, segment, segment.start))
            parts.append(_own(query[rows], key[rows], value[rows]))
        out[rows] = _merge(parts).flatten(0, 1).transpose(0, 1)
    return out


def _history(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segment: Segment,
    num_tokens: int,
) -> Iterator[Part]:
    """Attention of all queries [n, heads, d] to tokens [0, num_tokens), a part per piece."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    grouped = query.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(1, num_kv_heads, group * num_queries, head_dim)
    for first, last in segment.pieces(num_tokens):
        out, lse = _flash(grouped, _heads_first(keys[first:last]), _heads_first(values[first:last]))
        yield (
            out.view(num_kv_heads, group, num_queries, head_dim),
            lse.view(num_kv_heads, group, num_queries),
        )


def _own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Part:
    """Causal attention of a segment's tokens among themselves."""
    num_queries, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    out, lse = _flash(_heads_first(query), _heads_first(key), _heads_first(value), is_causal=True)
    return (
        out.view(-1, group, num_queries, head_dim),
        lse.view(-1, group, num_queries),
    )


def _merge(parts: Sequence[Part]) -> torch.Tensor:
    """One output from parts over disjoint keys: each weighed by its share of the softmax's sum."""
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
    total = sum(out.float() * w[..., None] for (out, _), w in zip(parts, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(parts[0][0].dtype)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[n, heads, d] -> [1, heads, n, d], a view."""
    return x.transpose(0, 1)[None]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, heads, n, d] and log-sum-exp [1, heads, n]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal
    )
    # The kernel lays its output out as [1, n, heads, d] and its log-sum-exp as [1, n, heads].
    return out.contiguous(), lse.contiguous()
