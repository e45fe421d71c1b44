"""Attention of new tokens over paged keys and values.

    segment.py    where a sequence's tokens stand in a batch and in the cache
    reference.py  plain torch; the specification of the others
    cpu.py        torch's flash kernel over each run of the history in place
    single.py     single bfloat16 tokens on a CPU, by a compiled kernel
    triton.py     kernels for GPUs
    metadata.py   the work of a step as those kernels read it; built once, used by every layer
    launch.py     checks, grid and launch

Tensors on a CPU take cpu.py; on a CUDA device triton.py where triton is installed, else
reference.py. What has run: cpu.py on x86-64. triton.py in Triton's interpreter only, in float32 and
float16; it compiles for compute capability 8.0 and 9.0, but has not run on a GPU yet, and its
tile sizes are untuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chiasm.kernels.attention import cpu, launch, reference
from chiasm.kernels.attention import metadata as layout
from chiasm.kernels.attention.metadata import Metadata
from chiasm.kernels.attention.segment import Segment
from chiasm.kernels.attention.single import Singles
from chiasm.kernels.device import is_triton

__all__ = ["Metadata", "Segment", "Singles", "paged_attention", "prepare"]


def prepare(
    segments: Sequence[Segment], device: torch.device, *, group: int
) -> Metadata | Singles | None:
    """What `paged_attention` would work out anew for each layer; None where it needs nothing.

    group: query heads per kv head.
    """
    if device.type == "cpu":
        return Singles.of(segments)
    return layout.prepare(segments, device, group=group) if is_triton(device) else None


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    segments: Sequence[Segment],
    metadata: Metadata | Singles | None = None,
) -> torch.Tensor:
    """Attends causally within each segment; see reference.py for the exact statement.

    query [T, heads, d]; key, value [T, kv_heads, d]: the new tokens', stored in the cache already.
    cache [2, slots, kv_heads, d]. The segments cover all T rows; `metadata` is what `prepare` made
    of them. Returns [T, heads, d].
    """
    if query.device.type == "cpu":
        singles = metadata if isinstance(metadata, Singles) else None
        return cpu.paged_attention(query, key, value, cache, segments, singles)
    if is_triton(query.device):
        assert not isinstance(metadata, Singles)
        with torch.cuda.device(query.device):  # triton launches on the current device
            return launch.paged_attention(query, key, value, cache, segments, metadata)
    return reference.paged_attention(query, key, value, cache, segments)
