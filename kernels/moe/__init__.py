"""Routed experts of one shard: weighted partial sums over its experts."""

from chiasm.kernels.moe.reference import ShardWeights, shard_partial

__all__ = ["ShardWeights", "shard_partial"]
