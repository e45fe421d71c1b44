"""Routed experts on a CPU: every expert's tokens together, each matrix read once."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from chiasm.kernels import dense, native
from chiasm.kernels.moe.reference import ShardWeights
from chiasm.kernels.moe.scratch import groups
from chiasm.kernels.quant.cpu import Runs, grouped_linear
from chiasm.kernels.quant.formats import ExpertMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices, rotate


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.moe.reference.shard_partial."""
    local = expert_ids.long() - weights.first  # [T, K]
    mine = (local >= 0) & (local < weights.num_experts)
    rows = mine.any(dim=-1).nonzero().squeeze(-1)  # [N]
    values = torch.zeros(rows.numel(), hidden.shape[1], dtype=torch.float32)
    token, choice = mine.nonzero(as_tuple=True)
    expert = local[token, choice]
    # By expert, and within an expert by token: a token's experts come in ascending order.
    expert, order = torch.sort(expert, stable=True)
    token, choice = token[order], choice[order]
    slot = torch.searchsorted(rows, token)
    counts = torch.bincount(expert, minlength=weights.num_experts).tolist()
    gate_up = weights.gate_up
    if isinstance(gate_up, RotatedMatrices):  # once, however many groups there are
        gate_up, hidden = gate_up.inner, rotate(hidden)
    begin = 0
    for experts in groups(counts, pair_bytes=_pair_bytes(weights.down, hidden.dtype)):
        runs = _runs(experts, counts, token[begin:])
        part = slice(begin, begin + len(runs.index))
        results = _results(hidden, gate_up, weights.down, runs)
        combine(results, expert_weights[token[part], choice[part]], slot[part], values)
        begin = part.stop
    return rows.to(torch.int32), values


def combine(
    results: torch.Tensor, weight: torch.Tensor, slot: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds weight[i] * results[i] to row slot[i] of values, in float32 and by ascending i.

    results: [P, H]. weight: float32 [P]. slot: int64 [P]. values: float32 [N, H].
    """
    library = native.library()
    known = {torch.float32: "chiasm_combine_float32", torch.bfloat16: "chiasm_combine_bfloat16"}
    if library is None or results.dtype not in known:
        combine_by_turns(results, weight, slot, values)
        return
    given = [results.contiguous(), weight.float().contiguous(), slot.contiguous()]
    getattr(library, known[results.dtype])(
        dense.pointer(given[0]),
        ctypes.c_int64(results.shape[1]),
        *map(dense.pointer, given[1:]),
        ctypes.c_int64(len(slot)),
        dense.pointer(values),
        ctypes.c_int64(len(values)),
        torch.get_num_threads(),
    )


def combine_by_turns(
    results: torch.Tensor, weight: torch.Tensor, slot: torch.Tensor, values: torch.Tensor
) -> None:
    """As `combine`, in torch, and slower: what is scaled is held beside the results."""
    scaled = results.float() * weight[:, None]
    for turn in _turns(slot):
        values.index_add_(0, slot[turn], scaled[turn])


def _results(
    hidden: torch.Tensor, gate_up: ExpertMatrices, down: ExpertMatrices, runs: Runs
) -> torch.Tensor:
    """[P, H] of the pairs of some experts, in hidden's dtype."""
    gate, up = grouped_linear(gate_up, hidden, runs).chunk(2, dim=-1)
    inner = F.silu(gate) * up  # [P, I]
    del gate, up  # which take more than all that follows
    straight = torch.arange(len(inner), dtype=torch.int32)
    return grouped_linear(down, inner, replace(runs, index=straight))


def _pair_bytes(down: ExpertMatrices, dtype: torch.dtype) -> int:
    """Held at a time: gate, up and as much again; or a result, as float32 too, and a copy."""
    width, inner = down.shape
    return max(4 * inner * dtype.itemsize, width * (dtype.itemsize + 4 + 4))


def _runs(experts: range, counts: Sequence[int], token: torch.Tensor) -> Runs:
    """The pairs of `experts`, the first of `token`."""
    held = [expert for expert in experts if counts[expert]]
    ends = list(itertools.accumulate(counts[expert] for expert in held))
    return Runs(
        experts=held, begin=[0, *ends[:-1]], end=ends, index=token[: ends[-1]].to(torch.int32)
    )


def _turns(slot: torch.Tensor) -> list[torch.Tensor]:
    """The pairs (by row of the result) cut so that each turn has a row at most once, in order.

    What is added to a row comes in ascending experts then, however many rows there are.
    """
    order = torch.argsort(slot, stable=True)
    by_slot = slot[order]
    first = torch.searchsorted(by_slot, by_slot)  # where each row's pairs begin
    rank = torch.empty_like(slot)
    rank[order] = torch.arange(len(slot)) - first
    return [(rank == turn).nonzero().squeeze(-1) for turn in range(int(rank.max()) + 1)]
