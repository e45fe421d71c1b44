"""tcq2: two bits a weight, each of 256 levels, by trellis-coded quantisation.

A row is one path through a trellis of 256 states: every weight adds a symbol of two bits to a shift
register of eight, whose content is the index of a level in a table. So the levels of neighbours
overlap in six bits, and of the 4^K paths the encoder takes the one of least squared error (Viterbi
1967; Marcellin & Fischer 1990; as a shift register: Tseng et al. 2024, arXiv:2406.11235). The table
is trained for Gaussian weights; see table.py. Each group of 128 has a local scale of 8 bits, in
units of the row's scale.
"""

from __future__ import annotations

import ctypes

import torch

from chiasm.errors import InvalidArgument
from chiasm.kernels import native
from chiasm.kernels.quant.formats import GROUP, Tcq2Matrices, per_weight
from chiasm.kernels.quant.table import STEP, load

SYMBOLS_PER_BYTE = 4
SPREAD = 1.05
"""A group's scale by its root mean square; refined once the path is known."""

_STATES, _TAILS = 256, 64
_MAX_LOCAL = 255


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> Tcq2Matrices:
    """weight: float [E, N, K], K a multiple of 4; what becomes of it is on its device.

    importance: [K], above zero, weighs the squared errors, as the mean square of each input does;
    None is all one. On another device sums may round otherwise, and so the scales. Raises
    InvalidArgument for another K.
    """
    num_experts, n, k = weight.shape
    if k % SYMBOLS_PER_BYTE:
        raise InvalidArgument("weight", f"tcq2 takes a multiple of 4 inputs, not {k}")
    table = load().to(weight.device)
    importance = torch.ones(k, device=weight.device) if importance is None else importance.float()
    heed = importance / importance.mean()
    rows = weight.float().reshape(-1, k)
    # In units of its largest value a row is neither too small nor too large to be squared.
    largest = rows.abs().amax(dim=-1)
    rows = rows / torch.where(largest > 0, largest, 1)[:, None]
    row, local = _scales(rows)
    codes = paths(rows / torch.where(row > 0, row, 1)[:, None], local, heed, table)
    level = table.float()[states(codes)]
    row, local = _refit(rows, level, row, heed)
    shape = (num_experts, n, -1)
    return Tcq2Matrices(
        codes.view(shape), local.view(shape), (row * largest).view(num_experts, n), table
    )


def paths(
    rows: torch.Tensor, local: torch.Tensor, heed: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """uint8 [R, K/4]: of every row the symbols of least sum of heed * (w - level * local)^2.

    rows: float32 [R, K] in units of the row's scale; local: uint8 [R, groups]; heed: float32 [K].
    All on one device, and the same bits on each.
    """
    library = native.library() if rows.device.type == "cpu" else None
    if library is None:
        return reference_paths(rows, local, heed, table)
    rows, local, heed, table = (t.contiguous() for t in (rows, local, heed, table))
    codes = torch.empty(rows.shape[0], rows.shape[1] // SYMBOLS_PER_BYTE, dtype=torch.uint8)
    library.chiasm_viterbi(
        *(ctypes.c_void_p(t.data_ptr()) for t in (rows, local, heed, table)),
        *map(ctypes.c_int64, rows.shape),
        ctypes.c_void_p(codes.data_ptr()),
        torch.get_num_threads(),
    )
    return codes


def reference_paths(
    rows: torch.Tensor, local: torch.Tensor, heed: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """`paths` in plain torch, all rows at once; the specification, bit for bit."""
    num_rows, k = rows.shape
    cost = rows.new_full((num_rows, _STATES), torch.inf)
    cost[:, 0] = 0  # the register begins with zeros
    choices = local.new_empty(k, num_rows, _TAILS)
    for t in range(k):
        # The states p * 64 + q, p = 0..3, lead to the states 4 q + symbol.
        choices[t], best = _least(cost.view(num_rows, 4, _TAILS))
        level = table.int() * local[:, t // GROUP, None].int()
        error = rows[:, t, None] - level.float()
        cost = best.repeat_interleave(4, dim=1) + error * error * heed[t]
    state = cost.argmin(dim=1)
    states = local.new_empty(num_rows, k)
    for t in reversed(range(k)):
        states[:, t] = state
        tail = state >> 2
        state = choices[t].gather(1, tail[:, None])[:, 0].long() * _TAILS + tail
    # After four symbols the register holds nothing else.
    return states[:, SYMBOLS_PER_BYTE - 1 :: SYMBOLS_PER_BYTE].contiguous()


def _least(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over p of [R, 4, 64]: the first p of the least cost, and that cost."""
    second, fourth = cost[:, 1] < cost[:, 0], cost[:, 3] < cost[:, 2]
    front, back = torch.minimum(cost[:, 1], cost[:, 0]), torch.minimum(cost[:, 3], cost[:, 2])
    is_back = back < front
    choice = torch.where(is_back, 2 + fourth.int(), second.int())
    return choice.to(torch.uint8), torch.minimum(back, front)


def states(codes: torch.Tensor) -> torch.Tensor:
    """int64 [R, K]: the register after each weight of rows of codes [R, K/4]."""
    wide = codes.long()
    window = torch.nn.functional.pad(wide, (1, 0))[:, :-1] << 8 | wide
    return torch.stack([window >> shift & 255 for shift in (6, 4, 2, 0)], dim=-1).flatten(-2)


def _scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """row float32 [R] and local uint8 [R, groups]: local * row * level is near the weights."""
    squares = _group_sums(rows.square())
    counts = _group_sums(rows.new_ones(1, rows.shape[-1]))
    wanted = (squares / counts).sqrt() * (SPREAD * STEP)
    row = wanted.amax(dim=-1) / _MAX_LOCAL
    return row, _local(wanted, row)


def _refit(
    rows: torch.Tensor, level: torch.Tensor, row: torch.Tensor, heed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares for the path found: each group's scale, then the row's."""
    wanted = _ratio(_group_sums(rows * level * heed), _group_sums(level.square() * heed)).clamp(0)
    row = torch.maximum(row, wanted.amax(dim=-1) / _MAX_LOCAL)
    local = _local(wanted, row)
    value = level * per_weight(local.float(), rows.shape[-1])
    fitted = _ratio((rows * value * heed).sum(dim=-1), (value.square() * heed).sum(dim=-1))
    return torch.where(fitted > 0, fitted, row), local


def _local(wanted: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    units = _ratio(wanted, row[:, None].expand_as(wanted))
    return torch.round(units).clamp(0, _MAX_LOCAL).to(torch.uint8)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0.0)


def _group_sums(values: torch.Tensor) -> torch.Tensor:
    """[R, K] -> [R, groups]."""
    missing = -values.shape[-1] % GROUP
    filled = torch.nn.functional.pad(values, (0, missing))
    return filled.view(values.shape[0], -1, GROUP).sum(dim=-1)
