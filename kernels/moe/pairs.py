"""Pairs of a token and one of a shard's experts, and their results added up by token, on a CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from chiasm.kernels import native
from chiasm.kernels.dense import pointer


@dataclass(frozen=True, slots=True)
class Pairs:
    """By expert, and within an expert by token: a token's experts come in ascending order."""

    rows: torch.Tensor
    """int32 [N]: the tokens that have pairs, ascending."""
    token: torch.Tensor
    """int32 [P]."""
    slot: torch.Tensor
    """int64 [P]: the place of each pair's token among `rows`."""
    weight: torch.Tensor
    """float32 [P]."""
    counts: list[int]
    """Pairs of each expert."""


def pairs_of(
    expert_ids: torch.Tensor, expert_weights: torch.Tensor, first: int, num_experts: int
) -> Pairs:
    """The pairs of the experts [first, first + num_experts).

    expert_ids: int32 [T, K]. expert_weights: float32 [T, K].
    """
    library = native.library()
    if library is None:
        return pairs_by_torch(expert_ids, expert_weights, first, num_experts)
    num_tokens, k = expert_ids.shape
    ids, weights = expert_ids.to(torch.int32).contiguous(), expert_weights.float().contiguous()
    rows = torch.empty(num_tokens, dtype=torch.int32)
    token = torch.empty(num_tokens * k, dtype=torch.int32)
    slot = torch.empty(num_tokens * k, dtype=torch.int64)
    weight = torch.empty(num_tokens * k)
    counts, num_rows = (ctypes.c_int32 * num_experts)(), ctypes.c_int64()
    find = library.chiasm_pairs
    find.restype = ctypes.c_int64
    num_pairs = find(
        pointer(ids),
        pointer(weights),
        ctypes.c_int64(num_tokens),
        ctypes.c_int64(k),
        ctypes.c_int32(first),
        ctypes.c_int32(num_experts),
        pointer(rows),
        ctypes.byref(num_rows),
        *map(pointer, (token, slot, weight)),
        counts,
    )
    return Pairs(
        rows[: num_rows.value],
        token[:num_pairs],
        slot[:num_pairs],
        weight[:num_pairs],
        list(counts),
    )


def pairs_by_torch(
    expert_ids: torch.Tensor, expert_weights: torch.Tensor, first: int, num_experts: int
) -> Pairs:
    """As `pairs_of`, in torch."""
    local = expert_ids.long() - first  # [T, K]
    mine = (local >= 0) & (local < num_experts)
    rows = mine.any(dim=-1).nonzero().squeeze(-1)  # [N]
    token, choice = mine.nonzero(as_tuple=True)
    expert, order = torch.sort(local[token, choice], stable=True)
    token, choice = token[order], choice[order]
    return Pairs(
        rows.to(torch.int32),
        token.to(torch.int32),
        torch.searchsorted(rows, token),
        expert_weights[token, choice].float(),
        torch.bincount(expert, minlength=num_experts).tolist(),
    )


def combine(
    results: torch.Tensor, weight: torch.Tensor, slot: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds weight[i] * results[i] to row slot[i] of values, in float32 and by ascending i.

    results: [P, H]. weight: float32 [P]. slot: int64 [P]. values: float32 [N, H].
    """
    library = native.library()
    known = {torch.float32: "chiasm_combine_float32", torch.bfloat16: "chiasm_combine_bfloat16"}
    if library is None or results.dtype not in known:
        combine_by_torch(results, weight, slot, values)
        return
    given = [results.contiguous(), weight.contiguous(), slot.contiguous()]
    getattr(library, known[results.dtype])(
        pointer(given[0]),
        ctypes.c_int64(results.shape[1]),
        *map(pointer, given[1:]),
        ctypes.c_int64(len(slot)),
        pointer(values),
        ctypes.c_int64(len(values)),
        torch.get_num_threads(),
    )


def combine_by_torch(
    results: torch.Tensor, weight: torch.Tensor, slot: torch.Tensor, values: torch.Tensor
) -> None:
    """As `combine`, in torch, and slower: what is scaled is held beside the results."""
    scaled = results.float() * weight[:, None]
    for turn in _turns(slot):
        values.index_add_(0, slot[turn], scaled[turn])


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
