"""Kernels that are compiled before anybody asks are those that dispatches need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quant.matrices import int4

from chiasm.kernels.moe import ShardWeights, ahead, launch
from chiasm.kernels.moe.configs import Tile
from chiasm.kernels.quant.formats import DenseMatrices, ExpertMatrices

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted there")


def dense(experts: int, n: int, k: int) -> DenseMatrices:
    return DenseMatrices(torch.zeros(experts, n, k))


@pytest.mark.parametrize("make", [dense, int4])
def test_what_dispatches_need_was_compiled_ahead(
    make: Callable[[int, int, int], ExpertMatrices], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by shapes and constants, which decide what is compiled."""
    used: set[tuple[Any, ...]] = set()
    constants = launch.constants

    def noted(matrices: Any, tile: Tile) -> dict[str, object]:
        found = constants(matrices, tile)
        used.add((matrices.shape, *found.values()))
        return found

    monkeypatch.setattr(launch, "constants", noted)
    weights = ShardWeights(first=4, gate_up=make(32, 32, 128), down=make(32, 128, 16))
    cpu = torch.device("cpu")  # where Triton's interpreter runs
    ahead.compile_ahead(weights, top_k=2, dtype=torch.float32, device=cpu)
    known = set(used)
    assert {entry[2] for entry in known} == {16, 32, 64, 128}
    for tokens, experts in ((1, 40), (9, 1), (20, 2), (33, 1), (70, 40), (200, 1)):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(4, 4 + experts, (tokens, 2), generator=generator, dtype=torch.int32)
        launch.shard_partial(torch.zeros(tokens, 128), ids, torch.ones(tokens, 2), weights)
    assert used == known
