"""DispatchRequest to arguments and partials to DispatchResponse, every bound checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chiasm import errors
from chiasm.model.config import TextConfig
from chiasm.model.moe import Partial
from chiasm.transport import tensors
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.types import Modality
from chiasm.v1 import experts_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """What a server accepts."""

    modality: Modality
    num_shards: int
    dtype: torch.dtype
    max_tokens: int
    text: TextConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchArguments:
    """A checked dispatch: arguments of ExpertBank.partials."""

    layer: int
    shards: tuple[int, ...]
    hidden: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


def check_envelope(request: experts_pb2.DispatchRequest, limits: DispatchLimits) -> None:
    """Checks everything that needs no payload. Raises InvalidArgument with the field named."""
    _require(
        request.modality == WIRE_MODALITIES[limits.modality],
        "modality",
        f"this server serves {limits.modality}",
    )
    _require(
        request.num_shards == limits.num_shards,
        "num_shards",
        f"this pool is cut into {limits.num_shards}",
    )
    _require(
        request.layer in limits.text.moe_layers, "layer", f"layer {request.layer} has no experts"
    )
    shards = list(request.shards)
    _require(
        bool(shards) and shards == sorted(set(shards)) and shards[-1] < limits.num_shards,
        "shards",
        f"must be ascending, without repeats, below {limits.num_shards}",
    )
    shape = list(request.hidden.shape)
    _require(
        len(shape) == 2 and shape[1] == limits.text.hidden_size,
        "hidden.shape",
        f"must be [T, {limits.text.hidden_size}], is {shape}",
    )
    _require(1 <= shape[0] <= limits.max_tokens, "hidden.shape", f"1 to {limits.max_tokens} tokens")


def decode(request: experts_pb2.DispatchRequest, limits: DispatchLimits) -> DispatchArguments:
    """The payload as tensors. Raises InvalidArgument or DataLoss with the field named."""
    hidden = tensors.from_wire(request.hidden, name="hidden")
    expert_ids = tensors.from_wire(request.expert_ids, name="expert_ids")
    weights = tensors.from_wire(request.expert_weights, name="expert_weights")
    _require(hidden.dtype is limits.dtype, "hidden.dtype", f"this server computes {limits.dtype}")
    _require(expert_ids.dtype is torch.int32, "expert_ids.dtype", "must be int32")
    _require(weights.dtype is torch.float32, "expert_weights.dtype", "must be float32")
    chosen = (hidden.shape[0], limits.text.moe_k)
    _require(expert_ids.shape == chosen, "expert_ids.shape", f"must be {list(chosen)}")
    _require(weights.shape == chosen, "expert_weights.shape", f"must be {list(chosen)}")
    in_bank = (expert_ids >= 0) & (expert_ids < limits.text.num_experts)
    _require(bool(in_bank.all()), "expert_ids", f"ids must lie in 0..{limits.text.num_experts - 1}")
    return DispatchArguments(
        layer=request.layer,
        shards=tuple(request.shards),
        hidden=hidden,
        expert_ids=expert_ids,
        expert_weights=weights,
    )


def encode(partials: Sequence[Partial]) -> experts_pb2.Partials:
    """Partials, ascending in shard, as they travel."""
    return experts_pb2.Partials(
        shards=[
            experts_pb2.ShardPartial(
                shard=p.shard, rows=tensors.to_wire(p.rows), values=tensors.to_wire(p.values)
            )
            for p in partials
        ]
    )


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise errors.InvalidArgument(field, message)
