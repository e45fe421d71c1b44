"""Routed experts on a CPU: every expert's tokens together, each matrix read once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from chiasm.kernels.moe.few import add_experts
from chiasm.kernels.moe.pairs import combine, pairs_of
from chiasm.kernels.moe.reference import ShardWeights
from chiasm.kernels.moe.scratch import groups
from chiasm.kernels.moe.swiglu import swiglu
from chiasm.kernels.quant.cpu import Runs, grouped_linear
from chiasm.kernels.quant.formats import ExpertMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices, rotate


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
    spent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.moe.shard_partial."""
    # A thread that has asked torch for nothing yet would multiply with as many threads as OpenMP
    # likes, and round by their number.
    assert torch.get_num_threads()
    pairs = pairs_of(expert_ids, expert_weights, weights.first, weights.num_experts)
    values = torch.zeros(pairs.rows.numel(), hidden.shape[1], dtype=torch.float32)
    gate_up = weights.gate_up
    if isinstance(gate_up, RotatedMatrices):  # once, however many groups there are
        gate_up, hidden = gate_up.inner, rotate(hidden)
    begin = 0
    for experts in groups(pairs.counts, pair_bytes=_pair_bytes(weights.down, hidden.dtype)):
        runs = _runs(experts, pairs.counts, pairs.token[begin:], spent)
        part = slice(begin, begin + len(runs.index))
        to = (pairs.weight[part], pairs.slot[part], values)
        if not add_experts(hidden, gate_up, weights.down, runs, *to):
            combine(_results(hidden, gate_up, weights.down, runs), *to)
        begin = part.stop
    return pairs.rows, values


def _results(
    hidden: torch.Tensor, gate_up: ExpertMatrices, down: ExpertMatrices, runs: Runs
) -> torch.Tensor:
    """[P, H] of the pairs of some experts, in hidden's dtype."""
    inner = swiglu(grouped_linear(gate_up, hidden, runs))  # [P, I]
    straight = torch.arange(len(inner), dtype=torch.int32)
    return grouped_linear(down, inner, replace(runs, index=straight))


def _pair_bytes(down: ExpertMatrices, dtype: torch.dtype) -> int:
    """Held at a time: gate, up and as much again, or what they are made of; or a result, as float32
    too, and a copy; or what rotates the inputs of down; or in one call all of gate, up, inner row,
    as laid out for down too, and result. Products with tiles round runs up to 16 rows, which is not
    counted."""
    width, inner = down.shape
    inputs = (2 * inner + width) * dtype.itemsize
    rotated = 18 * inner if isinstance(down, RotatedMatrices) else 0
    in_one = 10 * inner + 2 * width
    in_turn = max(4 * inner * dtype.itemsize, inputs, width * (dtype.itemsize + 4 + 4))
    return max(in_turn, rotated, in_one)


def _runs(
    experts: range, counts: Sequence[int], token: torch.Tensor, spent: torch.Tensor | None
) -> Runs:
    """The pairs of `experts`, the first of `token`."""
    held = [expert for expert in experts if counts[expert]]
    ends = list(itertools.accumulate(counts[expert] for expert in held))
    return Runs(experts=held, begin=[0, *ends[:-1]], end=ends, index=token[: ends[-1]], spent=spent)
