"""DispatchRequest to arguments and partials to DispatchResponse, every bound checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chiasm import errors
from chiasm.model.config import TextConfig
from chiasm.model.moe import Partial
from chiasm.transport import tensors
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.transport.messages import answer_bytes
from chiasm.transport.shared_memory import Arenas, Region
from chiasm.types import Modality
from chiasm.v1 import experts_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """What a server accepts.

    max_queued: dispatches in its queue. max_queued_bytes: of those and of answers on their way out.
    """

    modality: Modality
    num_shards: int
    dtype: torch.dtype
    max_tokens: int
    max_queued: int
    max_queued_bytes: int
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
    # Lists are counted before they are looked through: their length is the peer's choice.
    shards = list(request.shards) if len(request.shards) <= limits.num_shards else []
    _require(
        bool(shards) and shards == sorted(set(shards)) and shards[-1] < limits.num_shards,
        "shards",
        f"must be ascending, without repeats, below {limits.num_shards}",
    )
    shape = request.hidden.shape
    _require(
        len(shape) == 2 and shape[1] == limits.text.hidden_size,
        "hidden.shape",
        f"must be [T, {limits.text.hidden_size}]",
    )
    _require(1 <= shape[0] <= limits.max_tokens, "hidden.shape", f"1 to {limits.max_tokens} tokens")


def max_answer_bytes(request: experts_pb2.DispatchRequest, limits: DispatchLimits) -> int:
    """Bound of the answer to a request whose envelope is checked."""
    num_shards = min(len(request.shards), limits.text.moe_k)
    return answer_bytes(request.hidden.shape[0], limits.text.hidden_size, num_shards)


def decode(
    request: experts_pb2.DispatchRequest, limits: DispatchLimits, arenas: Arenas | None
) -> DispatchArguments:
    """The payload of a request whose envelope is checked, as tensors.

    Raises InvalidArgument or DataLoss with the field named."""
    arena = arenas.requests if arenas is not None else None
    hidden = tensors.from_wire(request.hidden, name="hidden", arena=arena)
    expert_ids = tensors.from_wire(request.expert_ids, name="expert_ids", arena=arena)
    weights = tensors.from_wire(request.expert_weights, name="expert_weights", arena=arena)
    _require(hidden.dtype is limits.dtype, "hidden.dtype", f"this server computes {limits.dtype}")
    _require(expert_ids.dtype is torch.int32, "expert_ids.dtype", "must be int32")
    _require(weights.dtype is torch.float32, "expert_weights.dtype", "must be float32")
    chosen = (hidden.shape[0], limits.text.moe_k)
    _require(expert_ids.shape == chosen, "expert_ids.shape", f"must be {list(chosen)}")
    _require(weights.shape == chosen, "expert_weights.shape", f"must be {list(chosen)}")
    ids, last = expert_ids.numpy(), limits.text.num_experts - 1
    _require(0 <= ids.min() <= ids.max() <= last, "expert_ids", f"ids must lie in 0..{last}")
    return DispatchArguments(
        layer=request.layer,
        shards=tuple(request.shards),
        hidden=hidden,
        expert_ids=expert_ids,
        expert_weights=weights,
    )


def answer_region(request: experts_pb2.DispatchRequest, arenas: Arenas | None) -> Region | None:
    """Where the answer's payloads go; None: into the message.

    Raises InvalidArgument where the region lies outside the arena.
    """
    if arenas is None:
        return None
    asked = request.answer_region
    return Region(arenas.answers, asked.offset, asked.length)


def encode(partial: Partial, region: Region | None) -> experts_pb2.ShardPartial:
    """One shard's partial as it travels. Raises InvalidArgument when it does not fit."""
    return experts_pb2.ShardPartial(
        shard=partial.shard,
        rows=tensors.to_wire(partial.rows, region),
        values=tensors.to_wire(partial.values, region),
    )


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise errors.InvalidArgument(field, message)
