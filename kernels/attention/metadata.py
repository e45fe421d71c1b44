"""How a step's attention is laid out for the GPU: built once per step, used by every layer.

Everything here follows from the segments; it decides who computes what, never what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from chiasm import errors
from chiasm.kernels.attention.segment import Segment

TILE_ROWS = 64
"""Query rows (tokens times the heads of a group) of one program. One value for prefill and decode:
a matrix product of another height may round otherwise. Tiles are cut at fixed positions too."""

SPLIT_TOKENS = 512
"""Keys of one split: splits are cut at multiples of it, counted from the sequence's beginning."""

MAX_PARTIAL_ROWS = 1 << 16
"""Rows of partial results a step may hold, per kv head; bounds the memory taken for them."""

MAX_PAGE_SLOTS = 16

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """The work of one step, as the kernels read it.

    work: int32 [programs, 7]: row of the tile's first token, its position, number of tokens, index
        into `pages` of the segment's first page, first split, number of splits, and the partial row
        to write to, or -1 when the program does all splits and writes the result.
    spread: int32 [tokens, 4]: for each token whose splits were given to several programs, its row,
        its first partial row, the partial rows from one split to the next, the number of splits.
    pages: int32: for each `page_size` tokens of a segment, slot // page_size of the first of them.
    num_rows: T. num_slots: every slot read is below it.
    """

    group: int
    page_size: int
    num_rows: int
    num_slots: int
    num_partial_rows: int
    work: torch.Tensor
    spread: torch.Tensor
    pages: torch.Tensor


def prepare(segments: Sequence[Segment], device: torch.device, *, group: int) -> Metadata:
    """Lays out the segments' work for query heads in groups of `group` = heads / kv_heads.

    The only transfer of a step is one int32 array to the device.
    """
    if not 1 <= group <= TILE_ROWS:
        raise errors.Internal(f"attention groups of {group} heads; at most {TILE_ROWS} fit a tile")
    page_size = _page_size(segments)
    pages, first_page = _pages(segments, page_size)
    tiles = _tiles(segments, first_page, TILE_ROWS // group)
    work, spread, num_partial_rows = _spread(tiles, group)
    parts = [work, spread, pages]
    flat = torch.from_numpy(np.concatenate(parts, axis=None).astype(np.int32)).to(device)
    on_device = torch.split(flat, [part.size for part in parts])
    return Metadata(
        group=group,
        page_size=page_size,
        num_rows=sum(s.num_tokens for s in segments),
        num_slots=max(last for s in segments for _, last in s.pieces(s.stop)),
        num_partial_rows=num_partial_rows,
        work=on_device[0].view(work.shape),
        spread=on_device[1].view(spread.shape),
        pages=on_device[2],
    )


def _page_size(segments: Sequence[Segment]) -> int:
    """The largest power of two at whose multiples all runs begin, and all but the last end.

    With a block size of 16 or a multiple of it this is always 16: the kernel is compiled once.
    """
    common = MAX_PAGE_SLOTS
    for segment in segments:
        pieces = segment.pieces(segment.stop)
        for first, _ in pieces:
            common |= first
        for _, last in pieces[:-1]:
            common |= last
    return common & -common


def _pages(segments: Sequence[Segment], page_size: int) -> tuple[Ints, Ints]:
    """Pages of all segments' tokens, and where in them each segment's begin."""
    pieces = [segment.pieces(segment.stop) for segment in segments]
    ends = np.array([piece for found in pieces for piece in found], dtype=np.int64)
    first, count = ends[:, 0] // page_size, -(-(ends[:, 1] - ends[:, 0]) // page_size)
    starts = np.cumsum(count) - count
    pages = np.repeat(first - starts, count) + np.arange(count.sum())
    num_pieces = np.array([len(found) for found in pieces])
    return pages, starts[np.cumsum(num_pieces) - num_pieces]


def _tiles(segments: Sequence[Segment], first_page: Ints, tile_tokens: int) -> Ints:
    """Rows (row, position, number of tokens, first page, number of splits), most splits first."""
    row, start, num_tokens = np.array([(s.row, s.start, s.num_tokens) for s in segments]).T
    first_tile = start // tile_tokens
    num_tiles = -(-(start + num_tokens) // tile_tokens) - first_tile
    segment = np.repeat(np.arange(len(segments)), num_tiles)
    before = np.cumsum(num_tiles) - num_tiles
    cut = (first_tile[segment] + np.arange(len(segment)) - before[segment]) * tile_tokens
    position = np.maximum(cut, start[segment])
    stop = np.minimum(cut + tile_tokens, (start + num_tokens)[segment])
    num_splits = -(-stop // SPLIT_TOKENS)
    tiles = np.stack(
        [
            (row - start)[segment] + position,
            position,
            stop - position,
            first_page[segment],
            num_splits,
        ],
        axis=1,
    )
    # The longest start first, so that none is left running alone at the end.
    return tiles[np.argsort(-num_splits, kind="stable")]


def _spread(tiles: Ints, group: int) -> tuple[Ints, Ints, int]:
    """`work`, `spread` and the number of partial rows.

    Tiles of several splits get a program for each, the longest first, while partial rows last: when
    they do not, the step has programs enough to fill the device.
    """
    row, _, size, _, num_splits = tiles.T
    rows = np.where(num_splits > 1, size * group * num_splits, 0)
    is_spread = (rows > 0) & (np.cumsum(rows) <= MAX_PARTIAL_ROWS)
    rows = rows * is_spread
    base = np.cumsum(rows) - rows

    tile = np.repeat(np.arange(len(tiles)), np.where(is_spread, num_splits, 1))
    first_split = np.arange(len(tile)) - np.searchsorted(tile, tile)
    partial = np.where(is_spread[tile], base[tile] + first_split * (size * group)[tile], -1)
    splits = np.where(is_spread[tile], 1, num_splits[tile])
    work = np.stack([*tiles[tile, :4].T, first_split, splits, partial], axis=1)

    shared = np.repeat(np.flatnonzero(is_spread), size[is_spread])  # the tile of each spread token
    token = np.arange(len(shared)) - np.searchsorted(shared, shared)
    step = (size * group)[shared]
    spread = np.stack(
        [row[shared] + token, base[shared] + token * group, step, num_splits[shared]], axis=1
    )
    return work, spread, int(rows.sum())
