"""Attention over the cache in chunks equals attention over the whole sequence at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chiasm import errors
from chiasm.model.config import TextConfig
from chiasm.services.decoder.kv_cache import ContiguousKVCache, Segment

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


def cache(heads: int, kv_heads: int, head_dim: int, num_tokens: int) -> ContiguousKVCache:
    return ContiguousKVCache(
        config(heads, kv_heads, head_dim),
        num_tokens=num_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(~mask, -1e30), dim=-1), v)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (5, 1, 16), (3, 3, 8)])
@pytest.mark.parametrize("cuts", [[11], [4, 11], [1, 2, 3, 11], [10, 11]])
def test_chunks_and_steps_of_two_interleaved_sequences(
    heads: int, kv_heads: int, head_dim: int, cuts: list[int]
) -> None:
    g = torch.Generator().manual_seed(heads)
    data = {
        s: tuple(torch.randn(11, n, head_dim, generator=g) for n in (heads, kv_heads, kv_heads))
        for s in (1, 2)
    }
    target = cache(heads, kv_heads, head_dim, 40)
    for s in data:
        target.reserve(s, 15)
    found: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for start, stop in zip([0, *cuts], cuts, strict=False):
        n = stop - start
        context = target.bind([Segment(1, 0, start, n), Segment(2, n, start, n)])
        rows = [torch.cat([data[s][i][start:stop] for s in (1, 2)]) for i in range(3)]
        out = context.attend(1, *rows)
        found[1].append(out[:n])
        found[2].append(out[n:])
    for s, (q, k, v) in data.items():
        assert torch.allclose(torch.cat(found[s]), full_attention(q, k, v), atol=TOLERANCE)


def test_reservations_are_bounded_and_returned() -> None:
    target = cache(2, 1, 8, 20)
    target.reserve(1, 12)
    assert not target.can_reserve(9)
    with pytest.raises(errors.ResourceExhausted):
        target.reserve(2, 9)
    target.release(1)
    assert target.num_reserved == 0
    target.reserve(2, 20)
