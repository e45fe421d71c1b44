"""Routed experts on a CPU: every expert's tokens together, each matrix read once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from chiasm.kernels.moe.few import partial_of_few
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
    gate_up, down = weights.gate_up, weights.down
    if isinstance(gate_up, RotatedMatrices):  # once, however many groups there are
        gate_up, hidden = gate_up.inner, rotate(hidden)
    partial = partial_of_few(hidden, expert_ids, expert_weights, weights, spent)
    if partial is not None:
        return partial
    pairs = pairs_of(expert_ids, expert_weights, weights.first, weights.num_experts)
    values = torch.zeros(pairs.rows.numel(), hidden.shape[1], dtype=torch.float32)
    begin = 0
    for experts in groups(pairs.counts, pair_bytes=_pair_bytes(down, hidden.dtype)):
        runs = _runs(experts, pairs.counts, pairs.token[begin:], spent)
        part = slice(begin, begin + len(runs.index))
        results = _results(hidden, gate_up, down, runs)
        combine(results, pairs.weight[part], pairs.slot[part], values)
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
    too, and a copy; or what rotates the inputs of down. Products with tiles round runs up to 16
    rows, which is not counted."""
    width, inner = down.shape
    inputs = (2 * inner + width) * dtype.itemsize
    rotated = 18 * inner if isinstance(down, RotatedMatrices) else 0
    return max(4 * inner * dtype.itemsize, inputs, width * (dtype.itemsize + 4 + 4), rotated)


def _runs(
    experts: range, counts: Sequence[int], token: torch.Tensor, spent: torch.Tensor | None
) -> Runs:
    """The pairs of `experts`, the first of `token`."""
    held = [expert for expert in experts if counts[expert]]
    ends = list(itertools.accumulate(counts[expert] for expert in held))
    return Runs(experts=held, begin=[0, *ends[:-1]], end=ends, index=token[: ends[-1]], spent=spent)
