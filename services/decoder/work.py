"""A dispatch cut for its servers: which rows each one gets, and what its answer means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from chiasm import errors
from chiasm.model.moe import Dispatch, Partial
from chiasm.transport import tensors
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.transport.shared_memory import ALIGNMENT, Arena, Region
from chiasm.v1 import experts_pb2

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one server gets: shards, ascending, and the rows that need any of them, int64 [n]."""

    shards: tuple[int, ...]
    rows: Ints
    num_pairs: int  # (row, shard) pairs: rows of the answer


class Work:
    """A dispatch on the host and the shards it touches."""

    def __init__(self, dispatch: Dispatch, shard_of: Ints, num_shards: int) -> None:
        """shard_of: int64 [E], the shard of each expert."""
        self.modality, self.layer, self.num_shards = dispatch.modality, dispatch.layer, num_shards
        self._hidden = dispatch.hidden.cpu()
        self._expert_ids = dispatch.expert_ids.cpu()
        self._expert_weights = dispatch.expert_weights.cpu()
        shard_ids = shard_of[self._expert_ids.numpy()]  # [T, K]
        self._needs = np.zeros((self.num_tokens, num_shards), dtype=np.bool_)
        self._needs[np.arange(self.num_tokens)[:, None], shard_ids] = True
        self.shards = tuple(np.flatnonzero(self._needs.any(axis=0)).tolist())

    @property
    def num_tokens(self) -> int:
        return int(self._hidden.shape[0])

    def part(self, shards: Sequence[int]) -> Part:
        """The rows that need any of the shards."""
        needs = self._needs[:, list(shards)]
        return Part(
            shards=tuple(shards),
            rows=np.flatnonzero(needs.any(axis=1)),
            num_pairs=int(needs.sum()),
        )

    def request_bytes(self, part: Part) -> int:
        """Room that the payloads of `request` take in an arena."""
        per_row = self._hidden.itemsize * self._hidden.shape[1] + 8 * self._expert_ids.shape[1]
        return len(part.rows) * per_row + 3 * ALIGNMENT

    def answer_bytes(self, part: Part) -> int:
        """Room that the answer's payloads take in an arena."""
        per_row = 4 * self._hidden.shape[1] + 4
        return part.num_pairs * per_row + 2 * ALIGNMENT * len(part.shards)

    def request(self, part: Part, region: Region | None = None) -> experts_pb2.DispatchRequest:
        """The message for one server, payloads in it or in `region`; what belongs to the call is
        left open."""
        hidden, ids, weights = self._hidden, self._expert_ids, self._expert_weights
        if len(part.rows) < self.num_tokens:
            rows = torch.from_numpy(part.rows)
            hidden, ids, weights = hidden[rows], ids[rows], weights[rows]
        return experts_pb2.DispatchRequest(
            modality=WIRE_MODALITIES[self.modality],
            layer=self.layer,
            shards=part.shards,
            num_shards=self.num_shards,
            hidden=tensors.to_wire(hidden, region),
            expert_ids=tensors.to_wire(ids, region),
            expert_weights=tensors.to_wire(weights, region),
        )

    def partials(
        self, part: Part, wire: experts_pb2.Partials, arena: Arena | None
    ) -> list[Partial]:
        """A server's answer in rows of the whole dispatch.

        Raises DataLoss when it is damaged or not the answer to `part`.
        """
        if [entry.shard for entry in wire.shards] != list(part.shards):
            raise errors.DataLoss(
                f"asked for shards {list(part.shards)}, got {[e.shard for e in wire.shards]}"
            )
        try:
            return [self._partial(part, entry, arena) for entry in wire.shards]
        except errors.InvalidArgument as error:
            raise errors.DataLoss(error.message) from None

    def _partial(self, part: Part, entry: experts_pb2.ShardPartial, arena: Arena | None) -> Partial:
        rows = np.flatnonzero(self._needs[part.rows, entry.shard]).astype(np.int32)
        if not tensors.holds(entry.rows, rows, arena):
            raise errors.DataLoss(f"shard {entry.shard}: rows are not those that need it")
        values = tensors.from_wire(entry.values, name="values", arena=arena)
        shape = (len(rows), self._hidden.shape[1])
        if values.shape != shape or values.dtype is not torch.float32:
            raise errors.DataLoss(f"shard {entry.shard}: values of shape {tuple(values.shape)}")
        return Partial(
            shard=entry.shard,
            rows=torch.from_numpy(part.rows[rows].astype(np.int32)),
            values=values,
        )
