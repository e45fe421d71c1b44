"""What a server has done, by shard and by expert: for its metrics and for placement."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from chiasm.load import ExpertLoad, ShardLoad
from chiasm.telemetry import metrics
from chiasm.types import Modality, shard_experts
from chiasm.v1 import experts_pb2


class Loads:
    """Cumulative counters. Written by the compute thread, read by any."""

    def __init__(self, modality: Modality, *, num_shards: int, num_experts: int) -> None:
        self._modality = str(modality)
        self._experts = [shard_experts(s, num_shards, num_experts) for s in range(num_shards)]
        self._tokens = [0] * num_shards
        self._compute_ns = [0] * num_shards
        # Looking labels up each time would cost more than counting.
        self._dispatch_tokens = metrics.DISPATCH_TOKENS.labels(self._modality)
        self._expert_tokens = cache(
            lambda expert: metrics.EXPERT_TOKENS.labels(self._modality, str(expert))
        )
        self._expert_seconds = cache(
            lambda expert: metrics.EXPERT_COMPUTE_SECONDS.labels(self._modality, str(expert))
        )
        self._shard_tokens = cache(
            lambda shard: metrics.SHARD_TOKENS.labels(self._modality, str(shard))
        )
        self._shard_seconds = cache(
            lambda shard: metrics.SHARD_COMPUTE_SECONDS.labels(self._modality, str(shard))
        )
        self._dispatches = self._queue_ns = self._dispatch_ns = 0

    def add(self, shard: int, *, tokens: int, compute_ns: int) -> None:
        """Books the computing of one shard for `tokens` tokens."""
        self._tokens[shard] += tokens
        self._compute_ns[shard] += compute_ns
        self._shard_tokens(shard).inc(tokens)
        self._shard_seconds(shard).inc(compute_ns / 1e9)

    def add_dispatch(
        self, shards: tuple[int, ...], expert_ids: torch.Tensor, spent_ns: torch.Tensor
    ) -> None:
        """Books a dispatch: ids int32 [T, K], of which those outside `shards` do not count.

        spent_ns: int64 [E], the time of each expert; zeros where it is not known.
        """
        self._dispatch_tokens.inc(expert_ids.shape[0])
        counts = np.bincount(expert_ids.numpy().ravel(), minlength=self._experts[-1].stop).tolist()
        spent = spent_ns.tolist()
        for shard in shards:
            for expert in self._experts[shard]:
                if counts[expert]:
                    self._expert_tokens(expert).inc(counts[expert])
                if spent[expert]:
                    self._expert_seconds(expert).inc(spent[expert] / 1e9)

    def add_queued(self, queue_ns: int) -> None:
        """Books a dispatch whose turn has come, and how long it waited for that."""
        self._dispatches += 1
        self._queue_ns += queue_ns

    def add_computed(self, compute_ns: int) -> None:
        """Books the time that a dispatch took, whatever its answer."""
        self._dispatch_ns += compute_ns

    def report(self, *, queued: int) -> ExpertLoad:
        """All of it, for the orchestrator."""
        return ExpertLoad(
            queued_dispatches=queued,
            dispatches_total=self._dispatches,
            queue_s_total=self._queue_ns / 1e9,
            compute_s_total=self._dispatch_ns / 1e9,
            shards=tuple(
                ShardLoad(
                    shard=shard,
                    tokens_total=tokens,
                    compute_s_total=self._compute_ns[shard] / 1e9,
                )
                for shard, tokens in enumerate(self._tokens)
                if tokens
            ),
        )

    def to_proto(self) -> list[experts_pb2.ShardLoad]:
        """The shards that had work, ascending."""
        return [
            experts_pb2.ShardLoad(shard=shard, tokens=tokens, compute_ns=self._compute_ns[shard])
            for shard, tokens in enumerate(self._tokens)
            if tokens
        ]
