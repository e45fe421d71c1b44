"""Checks, grid and launch of the Triton kernels in triton.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chiasm import errors
from chiasm.kernels.attention.metadata import SPLIT_TOKENS, TILE_ROWS, Metadata, prepare
from chiasm.kernels.attention.segment import Segment
from chiasm.kernels.device import DTYPES

MAX_HEAD_DIM = 256
KEY_BLOCK_BYTES = 16 << 10
"""Of keys, and of values, that a program holds at a time, per pipeline stage."""

NUM_STAGES = 2


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    segments: Sequence[Segment],
    metadata: Metadata | None = None,
) -> torch.Tensor:
    """See kernels.attention.paged_attention. `key` and `value` are not read, the cache holds them.

    Raises Internal when shapes, dtypes or devices do not fit together: nothing has run then.
    """
    num_kv_heads = cache.shape[2]
    if metadata is None:
        metadata = prepare(segments, query.device, group=query.shape[1] // num_kv_heads)
    _check(query, cache, metadata)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partials = _Partials(metadata, num_kv_heads, query)
    _attend(out, partials, query, cache, metadata)
    if len(metadata.spread):
        _combine(out, partials, metadata, num_kv_heads)
    return out


class _Partials:
    """What splits that run apart leave for the combine kernel, float32: sums and their scales."""

    def __init__(self, metadata: Metadata, num_kv_heads: int, query: torch.Tensor) -> None:
        def empty(*tail: int) -> torch.Tensor:
            shape = (metadata.num_partial_rows, num_kv_heads, *tail)
            return torch.empty(shape, dtype=torch.float32, device=query.device)

        self.out, self.max, self.sum = empty(query.shape[2]), empty(), empty()


def _attend(
    out: torch.Tensor,
    partials: _Partials,
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: Metadata,
) -> None:
    from chiasm.kernels.attention import triton as kernels

    head_dim = query.shape[2]
    block_d = dim_block(head_dim)
    kernels.paged_attention_kernel[len(metadata.work), cache.shape[2]](
        out,
        partials.out,
        partials.max,
        partials.sum,
        query,
        cache[0],
        cache[1],
        metadata.work,
        metadata.pages,
        head_dim**-0.5 * math.log2(math.e),
        out.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(1),
        cache.stride(2),
        GROUP=metadata.group,
        HEAD_DIM=head_dim,
        PAGE=metadata.page_size,
        SPLIT=SPLIT_TOKENS,
        BLOCK_M=TILE_ROWS,
        BLOCK_N=key_block(block_d, query.element_size()),
        BLOCK_D=block_d,
        num_warps=num_warps(block_d),
        num_stages=NUM_STAGES,
        enable_fp_fusion=False,  # both kernels must round alike
    )


def _combine(out: torch.Tensor, partials: _Partials, metadata: Metadata, num_kv_heads: int) -> None:
    from chiasm.kernels.attention import triton as kernels

    _, num_heads, head_dim = out.shape
    kernels.combine_kernel[len(metadata.spread), num_heads](
        out,
        partials.out,
        partials.max,
        partials.sum,
        metadata.spread,
        out.stride(0),
        num_kv_heads,
        GROUP=metadata.group,
        HEAD_DIM=head_dim,
        BLOCK_D=dim_block(head_dim),
        num_warps=1,
        enable_fp_fusion=False,
    )


def dim_block(head_dim: int) -> int:
    """The head dimension as the kernels hold it: matrix products take powers of two from 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def key_block(block_d: int, element_bytes: int) -> int:
    """Keys of one block: a power of two in 16..64, so that it divides a split."""
    return min(64, max(16, KEY_BLOCK_BYTES // (block_d * element_bytes)))


def num_warps(block_d: int) -> int:
    """Warps of one program: the two accumulators must fit their registers."""
    return 4 if block_d <= 64 else 8


def _check(query: torch.Tensor, cache: torch.Tensor, metadata: Metadata) -> None:
    num_rows, num_heads, head_dim = query.shape
    if query.dtype not in DTYPES or cache.dtype != query.dtype:
        raise errors.Internal(f"attention of {query.dtype} over a cache of {cache.dtype}")
    if not query.device == cache.device == metadata.work.device:
        raise errors.Internal(
            f"attention over {query.device}, {cache.device} and {metadata.work.device}"
        )
    if cache.shape[0] != 2 or cache.shape[3] != head_dim or head_dim > MAX_HEAD_DIM:
        raise errors.Internal(f"attention of {list(query.shape)} over {list(cache.shape)}")
    if num_heads != metadata.group * cache.shape[2] or num_rows != metadata.num_rows:
        raise errors.Internal(
            f"attention of {num_rows} tokens and {num_heads} heads laid out for "
            f"{metadata.num_rows} and {metadata.group * cache.shape[2]}"
        )
    if metadata.num_slots > cache.shape[1]:
        raise errors.Internal(f"slot {metadata.num_slots - 1} of {cache.shape[1]}")
    if query.stride(2) != 1 or cache.stride(3) != 1:
        raise errors.Internal("attention needs contiguous heads")
