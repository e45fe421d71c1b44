"""The paged cache: attention over blocks in chunks equals attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm.model.config import TextConfig
from chiasm.services.decoder.blocks import BlockPool, BlockTable
from chiasm.services.decoder.kv_cache import PagedKVCache, Placed

TOLERANCE = 1e-5


def config(heads: int, kv_heads: int, head_dim: int) -> TextConfig:
    return TextConfig(
        vocab_size=8,
        hidden_size=heads * head_dim,
        intermediate_size=8,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        mrope_section=(1, 1, head_dim // 2 - 2),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        sparse_layers=(False, True),
        moe_k=1,
        num_experts=2,
        text_intermediate=4,
        vision_intermediate=4,
        shared_intermediate=0,
        norm_min=1e-12,
    )


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(~mask, -1e30), dim=-1), v)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (5, 1, 16), (3, 3, 8)])
@pytest.mark.parametrize("cuts", [[11], [4, 11], [1, 2, 3, 11], [10, 11]])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_chunks_and_steps_of_two_interleaved_sequences(
    heads: int, kv_heads: int, head_dim: int, cuts: list[int], block_size: int
) -> None:
    g = torch.Generator().manual_seed(heads)
    data = [
        tuple(torch.randn(11, n, head_dim, generator=g) for n in (heads, kv_heads, kv_heads))
        for _ in range(2)
    ]
    blocks = BlockPool(-(-40 // block_size), block_size)
    cache = PagedKVCache(
        config(heads, kv_heads, head_dim), blocks, dtype=torch.float32, device=torch.device("cpu")
    )
    tables = [BlockTable(), BlockTable()]
    found: list[list[torch.Tensor]] = [[], []]
    for start, stop in zip([0, *cuts], cuts, strict=False):
        for table in tables:  # both grow by turns, so neither gets all its blocks in one run
            needed = -(-stop // block_size) - len(table)
            table.extend(blocks.allocate(needed, after=table.last))
        context = cache.bind([Placed(table, start, stop - start) for table in tables])
        rows = [torch.cat([sequence[i][start:stop] for sequence in data]) for i in range(3)]
        out = context.attend(1, *rows)
        for sequence, part in zip(found, out.chunk(2), strict=True):
            sequence.append(part)
    for sequence, (q, k, v) in zip(found, data, strict=True):
        assert torch.allclose(torch.cat(sequence), full_attention(q, k, v), atol=TOLERANCE)
