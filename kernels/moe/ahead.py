"""Has the kernels compiled that a shard will need, before anybody waits for its answer."""

from __future__ import annotations

import torch

from chiasm.kernels.moe import configs, launch
from chiasm.kernels.moe.reference import ShardWeights


def compile_ahead(
    weights: ShardWeights, *, top_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Answers dispatches of zeros: of every tile, and over as many experts as change a kernel.

    What a dispatch needs beyond that which does not fit SCRATCH_BYTES is compiled when it comes.
    """
    num_experts = weights.num_experts
    tuned = configs.load(launch.name_of(device))
    sizes = {*configs.HEIGHTS, *(n for tiles in tuned.values() for n in tiles)}
    spans = [1 << n for n in range(4, num_experts.bit_length())]
    for span in sorted({*spans, num_experts}):
        ends = sorted({weights.first, weights.first + span - 1})
        for size in sorted(sizes):
            ids = torch.full((len(ends) * size, top_k), -1, dtype=torch.int32, device=device)
            ids[:, 0] = torch.tensor(ends, dtype=torch.int32).repeat(size)
            hidden = torch.zeros(len(ids), weights.gate_up.shape[1], dtype=dtype, device=device)
            launch.shard_partial(hidden, ids, torch.zeros(ids.shape, device=device), weights)
