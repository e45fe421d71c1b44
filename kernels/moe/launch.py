"""Checks, grids and launches of the Triton kernels: one shard's answer to one dispatch.

Every choice made here, of tiles, of the path and of the groups, follows from the shard's own share
of the dispatch: a server that holds other shards as well gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from chiasm import errors
from chiasm.kernels.device import DTYPES
from chiasm.kernels.moe import configs, scratch
from chiasm.kernels.moe.configs import Operation, Problem, Tile
from chiasm.kernels.moe.operands import GROUPED, Operands, has_kernels, operands
from chiasm.kernels.moe.permute import MAX_EXPERTS, Permutation, permute
from chiasm.kernels.moe.reference import ShardWeights
from chiasm.kernels.moe.transform import dequantise, rotated
from chiasm.kernels.quant.formats import GROUP

DENSE_TOKENS = 64
"""Tokens per expert from which int4 and tcq2 are written out as weights before the product: below,
a product decodes every code once or twice anyway. Not measured yet."""

COMBINE_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Consecutive experts of a shard that are computed together."""

    permutation: Permutation
    experts: range
    top_k: int

    @property
    def starts(self) -> torch.Tensor:
        return self.permutation.starts[self.experts.start : self.experts.stop + 1]

    @property
    def counts(self) -> tuple[int, ...]:
        return self.permutation.counts[self.experts.start : self.experts.stop]

    @property
    def part(self) -> slice:
        return slice(self.experts.start, self.experts.stop)


def is_supported(weights: ShardWeights) -> bool:
    """Whether the kernels know the formats."""
    return has_kernels(weights.gate_up) and has_kernels(weights.down)


def shard_partial(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    weights: ShardWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.py. Raises Internal when shapes, dtypes or devices do not fit together:
    nothing has run then.
    """
    gate_up, down = operands(weights.gate_up), operands(weights.down)
    _check(hidden, expert_ids, expert_weights, gate_up, down)
    num_tokens, top_k = expert_ids.shape
    width = hidden.shape[1]
    if not num_tokens:
        return expert_ids.new_empty(0), expert_weights.new_empty(0, width)
    found = permute(
        expert_ids.contiguous(), first_expert=weights.first, num_experts=gate_up.num_experts
    )
    values = expert_weights.new_empty(found.rows.shape[0], width)
    is_decoded = tokens_per_expert(found.counts) >= DENSE_TOKENS
    if gate_up.is_rotated:
        hidden = rotated(hidden)
    is_first = True
    for experts in groups(found.counts, gate_up, down, hidden.dtype, is_decoded=is_decoded):
        call = Call(permutation=found, experts=experts, top_k=top_k)
        inner = run_gate_up(hidden, gate_up, call, is_decoded=is_decoded)
        if down.is_rotated:
            inner = rotated(inner)
        results = run_down(inner, expert_weights, down, call, is_decoded=is_decoded)
        _combine(values, results, call, is_first=is_first)
        is_first = False
    return found.rows, values


def tokens_per_expert(counts: tuple[int, ...]) -> int:
    """The mean over experts that have any, rounded up."""
    return -(-sum(counts) // max(1, sum(1 for count in counts if count)))


def run_gate_up(
    hidden: torch.Tensor,
    gate_up: Operands,
    call: Call,
    *,
    is_decoded: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """silu(gate) * up of a call's pairs: [P, I] in hidden's dtype, sorted."""
    from chiasm.kernels.moe.triton import experts as kernels

    matrices = _matrices(gate_up, call, hidden.dtype, is_decoded=is_decoded)
    tile = tile or _tile("gate_up", matrices, hidden, call)
    width = gate_up.shape[0] // 2
    out = hidden.new_empty(sum(call.counts), width)
    kernels.gate_up_kernel[(_num_programs(call, gate_up.shape[0], tile),)](
        out,
        hidden,
        call.permutation.order,
        call.starts,
        *matrices.arguments,
        len(call.experts),
        width,
        hidden.shape[1],
        matrices.codes.stride(1),
        hidden.stride(0),
        TOP_K=call.top_k,
        **constants(matrices, tile),
    )
    return out


def run_down(
    inner: torch.Tensor,
    expert_weights: torch.Tensor,
    down: Operands,
    call: Call,
    *,
    is_decoded: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The weighted results of a call's pairs: float32 [P, H], sorted."""
    from chiasm.kernels.moe.triton import experts as kernels

    matrices = _matrices(down, call, inner.dtype, is_decoded=is_decoded)
    tile = tile or _tile("down", matrices, inner, call)
    width, depth = down.shape
    out = expert_weights.new_empty(inner.shape[0], width)
    kernels.down_kernel[(_num_programs(call, width, tile),)](
        out,
        inner,
        expert_weights.contiguous(),
        call.permutation.order,
        call.starts,
        *matrices.arguments,
        len(call.experts),
        width,
        depth,
        matrices.codes.stride(1),
        **constants(matrices, tile),
    )
    return out


def constants(matrices: Operands, tile: Tile) -> dict[str, object]:
    """Constants and options that both products are compiled with."""
    step = GROUP if matrices.format in GROUPED else tile.block_k
    return {
        "FORMAT": matrices.format,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_E": max(16, 1 << (matrices.num_experts - 1).bit_length()),
        "IS_WHOLE": matrices.shape[1] % step == 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _combine(values: torch.Tensor, results: torch.Tensor, call: Call, *, is_first: bool) -> None:
    from chiasm.kernels.moe.triton import experts as kernels

    num_rows, width = values.shape
    kernels.combine_kernel[(num_rows, -(-width // COMBINE_BLOCK))](
        values,
        results,
        call.permutation.rows,
        call.permutation.place,
        call.starts,
        len(call.experts),
        width,
        TOP_K=call.top_k,
        BLOCK_K=1 << (call.top_k - 1).bit_length(),
        BLOCK_N=COMBINE_BLOCK,
        IS_FIRST=is_first,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _matrices(matrices: Operands, call: Call, dtype: torch.dtype, *, is_decoded: bool) -> Operands:
    """The call's experts' matrices as they are stored, or decoded."""
    part = matrices.of_experts(call.part)
    if is_decoded and matrices.format in GROUPED:
        return dequantise(part, call.starts, dtype)
    return part


def groups(
    counts: tuple[int, ...],
    gate_up: Operands,
    down: Operands,
    dtype: torch.dtype,
    *,
    is_decoded: bool,
) -> Iterator[range]:
    """`scratch.groups` of a call: of inner activations, results and, decoded, of weights."""
    width, inner = down.shape
    decoded = [m.shape[0] * m.shape[1] for m in (gate_up, down) if m.format in GROUPED]
    return scratch.groups(
        counts,
        pair_bytes=inner * dtype.itemsize + 4 * width,
        expert_bytes=max(decoded, default=0) * dtype.itemsize * is_decoded,
    )


def _num_programs(call: Call, rows: int, tile: Tile) -> int:
    num_tiles = sum(-(-count // tile.block_m) for count in call.counts)
    return num_tiles * -(-rows // tile.block_n)


def _tile(operation: Operation, matrices: Operands, x: torch.Tensor, call: Call) -> Tile:
    problem = Problem(
        operation=operation, format=matrices.format, dtype=x.dtype, shape=matrices.shape
    )
    return configs.choose(name_of(x.device), problem, tokens_per_expert(call.permutation.counts))


@functools.cache
def name_of(device: torch.device) -> str:
    """The GPU, as `configs` keeps its tiles."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: Operands,
    down: Operands,
) -> None:
    if hidden.dtype not in DTYPES or expert_ids.dtype != torch.int32:
        raise errors.Internal(f"experts {expert_ids.dtype} of rows {hidden.dtype}")
    if expert_weights.dtype != torch.float32 or expert_weights.shape != expert_ids.shape:
        raise errors.Internal(f"{expert_weights.dtype} {list(expert_weights.shape)} weights")
    for matrices in (gate_up, down):
        if matrices.format == "dense" and matrices.codes.dtype != hidden.dtype:
            raise errors.Internal(f"{matrices.codes.dtype} experts of {hidden.dtype} rows")
    tensors = (expert_ids, expert_weights, gate_up.codes, down.codes)
    if any(tensor.device != hidden.device for tensor in tensors):
        raise errors.Internal(f"experts over {hidden.device} and other devices")
    num_tokens, width = hidden.shape
    if hidden.stride(1) != 1 or expert_ids.dim() != 2 or expert_ids.shape[0] != num_tokens:
        raise errors.Internal(f"choices {list(expert_ids.shape)} of rows {list(hidden.shape)}")
    rows, depth = gate_up.shape
    num_experts = gate_up.num_experts
    if depth != width or down.shape != (width, rows // 2) or num_experts != down.num_experts:
        raise errors.Internal(
            f"{num_experts} and {down.num_experts} experts {list(gate_up.shape)} and "
            f"{list(down.shape)} for rows of {width}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise errors.Internal(f"{num_experts} experts; kernels take 1 to {MAX_EXPERTS}")
