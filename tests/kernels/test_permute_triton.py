"""The sort of a dispatch's pairs by expert; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from chiasm.kernels.moe import permute

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_permutation_is_a_stable_sort(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in many."""
    g = torch.Generator().manual_seed(seed)
    tokens, k = 5 + 20 * seed, 1 + seed
    ids = torch.randint(-1, 20, (tokens, k), generator=g, dtype=torch.int32).to(DEVICE)
    local = (ids.flatten() - 6).long()
    is_mine = (local >= 0) & (local < 7)
    order = torch.where(is_mine, local, 7).argsort(stable=True)[: int(is_mine.sum())].int()
    for block_pairs in (512, 16):
        monkeypatch.setattr(permute, "BLOCK_PAIRS", block_pairs)
        found = permute.permute(ids, first_expert=6, num_experts=7)
        counts = torch.bincount(local[is_mine], minlength=7).tolist()
        assert found.counts == tuple(counts)
        assert torch.equal(found.order[: len(order)], order)
        place = torch.full_like(ids.flatten(), -1)
        place[order.long()] = torch.arange(len(order), dtype=torch.int32, device=DEVICE)
        assert torch.equal(found.place.flatten(), place)
        assert torch.equal(found.starts.diff(), torch.tensor(counts, device=DEVICE).int())
        rows = is_mine.view(tokens, k).any(dim=1).nonzero().flatten().int()
        assert torch.equal(found.rows, rows)


def test_largest_bank() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, permute.MAX_EXPERTS, (40, 6), generator=g, dtype=torch.int32).to(DEVICE)
    found = permute.permute(ids, first_expert=0, num_experts=permute.MAX_EXPERTS)
    assert torch.equal(found.order, ids.flatten().argsort(stable=True).int())
    assert sum(found.counts) == ids.numel()
