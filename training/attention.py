"""Causal attention within the segments of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class CausalSegments:
    """Each segment attends to itself alone; a model.text.AttentionContext without a cache.

    Segments are grouped by length, from one power of two to the next, and each group is one batched
    call. Shorter ones are filled up behind their end, where a causal mask keeps every real token
    from looking, so the result is that of separate calls.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        groups: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in lengths:
            groups.setdefault((length - 1).bit_length(), []).append((start, length))
            start += length
        self._groups = [_padded_rows(segments) for _, segments in sorted(groups.items())]
        rows = torch.cat([rows.flatten() for rows, _ in self._groups])
        real = torch.cat([real.flatten() for _, real in self._groups]).nonzero().squeeze(-1)
        self._origin = torch.empty(start, dtype=torch.long)  # row -> place among the padded ones
        self._origin[rows[real]] = real

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads, d]."""
        attended = []
        for rows, _ in self._groups:
            q, k, v = (
                x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
                for x in (query, key, value)
            )  # [segments, heads, length, d]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            attended.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended).index_select(0, self._origin)


def _padded_rows(segments: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, length) of segments -> int64 rows [S, L] and bool [S, L], False in padding.

    Padding repeats the segment's last row.
    """
    starts, lengths = torch.tensor(segments).unbind(1)
    column = torch.arange(int(lengths.max()))
    rows = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
    return rows, column < lengths[:, None]
