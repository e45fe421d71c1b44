"""Shards in low precision: the partial sums of the reference, and the same bits everywhere."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from quant.matrices import FORMATS

from chiasm.kernels.moe import ShardWeights, cpu, reference
from chiasm.kernels.quant.hadamard import BLOCK, RotatedMatrices

HIDDEN, WIDTH, EXPERTS = 256, 96, 12
# In bfloat16 the two ways round differently, and each expert's result once more.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def shard(name: str, experts: range) -> ShardWeights:
    """Some experts of a bank of EXPERTS: the same ones whatever shard they stand in."""
    stacks = []
    for seed, shape in ((1, (2 * WIDTH, HIDDEN)), (2, (HIDDEN, WIDTH))):
        whole = FORMATS[name](EXPERTS, *shape, seed=seed)
        held = [
            tensor[experts.start : experts.stop].contiguous() if tensor.dim() > 1 else tensor
            for tensor in (getattr(whole, field.name) for field in dataclasses.fields(whole))
        ]
        stacks.append(type(whole)(*held))
    return ShardWeights(first=experts.start, gate_up=stacks[0], down=stacks[1])


def dispatch(
    tokens: int, dtype: torch.dtype, seed: int, k: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:k] for _ in range(tokens)])
    hidden = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    return hidden, ids.to(torch.int32), torch.rand(tokens, k, generator=g)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6, 150])
@pytest.mark.parametrize("name", FORMATS)
def test_partials_are_those_of_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    weights = shard(name, range(3, 11))
    given = dispatch(tokens, dtype, seed=tokens)
    rows, values = cpu.shard_partial(*given, weights)
    expected_rows, expected = reference.shard_partial(*given, weights)
    assert torch.equal(rows, expected_rows)
    assert rows.dtype is torch.int32
    assert values.dtype is torch.float32
    assert (values - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_for_other_shards_change_no_bit(
    name: str, is_rotated: bool, dtype: torch.dtype
) -> None:
    """A server that holds two shards gets the rows of both; one that holds one gets fewer."""
    weights = shard(name, range(4, 8))
    if is_rotated:
        weights = dataclasses.replace(weights, gate_up=RotatedMatrices(weights.gate_up))
    for tokens in (3, 40, 200):
        hidden, ids, gates = dispatch(tokens, dtype, seed=tokens)
        rows, values = cpu.shard_partial(hidden, ids, gates, weights)
        own = rows.long()
        alone, alone_values = cpu.shard_partial(hidden[own], ids[own], gates[own], weights)
        assert alone.tolist() == list(range(len(own)))
        assert torch.equal(alone_values, values)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("name", FORMATS)
def test_the_time_of_each_expert(name: str, tokens: int, dtype: torch.dtype) -> None:
    """It is added to what is there, of those with tokens alone, and never more than has passed."""
    weights = shard(name, range(3, 11))
    hidden, ids, gates = dispatch(tokens, dtype, seed=tokens)
    ids = torch.where(ids == 5, 1, ids)  # 5 has none
    spent = torch.full((weights.num_experts,), 7)
    start = time.monotonic_ns()
    rows, values = cpu.shard_partial(hidden, ids, gates, weights, spent)
    passed = time.monotonic_ns() - start
    busy = {int(e) - 3 for e in ids.unique() if 3 <= e < 11}
    assert busy
    assert {e for e, ns in enumerate(spent.tolist()) if ns > 7} == busy
    assert int((spent - 7).sum()) <= passed
    for found, expected in zip(
        (rows, values), cpu.shard_partial(hidden, ids, gates, weights), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("is_rotated", [False, True])
def test_no_token_for_a_shard(is_rotated: bool) -> None:
    gate_up = FORMATS["tcq2"](6, 2 * BLOCK, HIDDEN, seed=1)
    down = FORMATS["tcq2"](6, HIDDEN, BLOCK, seed=2)
    stacks = (RotatedMatrices(gate_up), RotatedMatrices(down)) if is_rotated else (gate_up, down)
    held = ShardWeights(first=6, gate_up=stacks[0], down=stacks[1])
    hidden, ids, weights = dispatch(5, torch.bfloat16, seed=4)
    for given in ((hidden, ids * 0, weights), (hidden[:0], ids[:0], weights[:0])):
        rows, values = cpu.shard_partial(*given, held)
        assert rows.tolist() == []
        assert values.shape == (0, HIDDEN)
