"""One new token a sequence on a CPU, in bfloat16: kernels/native/attention.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chiasm.kernels import native
from chiasm.kernels.attention.segment import Segment
from chiasm.kernels.dense import pointer

_MAX_GROUP, _WIDTH = 8, 32
"""Query heads of a kv head that the compiled kernel knows, and what divides a head's dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Singles:
    """A step's segments of one token each, as C++ wants them told.

    rows, lengths: of each segment its row and how many tokens it sees. begins: of each segment its
    first piece. pieces: first slot and number of slots, one piece after the other.
    """

    rows: ctypes.Array[ctypes.c_int64]
    lengths: ctypes.Array[ctypes.c_int64]
    begins: ctypes.Array[ctypes.c_int64]
    pieces: ctypes.Array[ctypes.c_int64]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Singles:
        """Those among the segments that are of one token."""
        single = [segment for segment in segments if segment.num_tokens == 1]
        begins: list[int] = []
        pieces: list[int] = []
        for segment in single:
            begins.append(len(pieces) // 2)
            for first, last in segment.pieces(segment.stop):
                pieces += (first, last - first)
        return cls(
            rows=_int64([segment.row for segment in single]),
            lengths=_int64([segment.stop for segment in single]),
            begins=_int64(begins),
            pieces=_int64(pieces),
        )


def is_readable(query: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether `attend` takes them on this machine."""
    _, _, num_kv_heads, head_dim = cache.shape
    return (
        query.dtype is torch.bfloat16 is cache.dtype
        and cache.is_contiguous()
        and head_dim % _WIDTH == 0
        and query.shape[1] // num_kv_heads <= _MAX_GROUP
        and native.has_bfloat16()
    )


def attend(query: torch.Tensor, cache: torch.Tensor, singles: Singles, out: torch.Tensor) -> None:
    """Sets the rows of `singles` in out [T, heads, d], contiguous as query is; see
    kernels.attention.paged_attention."""
    library = native.library()
    assert library is not None  # or it had no bfloat16
    keys, values = cache
    _, num_kv_heads, head_dim = keys.shape
    library.chiasm_attend(
        *map(pointer, (query, keys, values)),
        *map(ctypes.c_int64, (num_kv_heads, query.shape[1] // num_kv_heads, head_dim)),
        ctypes.c_int64(len(singles.rows)),
        singles.rows,
        singles.lengths,
        singles.begins,
        singles.pieces,
        pointer(out),
        torch.get_num_threads(),
    )


def _int64(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
