"""Shard partials against a loop over single tokens and experts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quant.matrices import tcq2
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.kernels import native
from chiasm.kernels.moe import ShardWeights, cpu, pairs, scratch, shard_partial
from chiasm.kernels.moe.swiglu import swiglu
from chiasm.kernels.quant.formats import DenseMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices
from chiasm.types import shard_experts

TOLERANCE = 2e-5


def bank(
    experts: int, hidden: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=g) / width**0.5
    return gate_up.to(dtype), down.to(dtype)


def routing(tokens: int, experts: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    return ids.to(torch.int32), torch.rand(tokens, k, generator=g)


def shard_of(gate_up: torch.Tensor, down: torch.Tensor, experts: range) -> ShardWeights:
    rows = slice(experts.start, experts.stop)
    return ShardWeights(
        first=experts.start, gate_up=DenseMatrices(gate_up[rows]), down=DenseMatrices(down[rows])
    )


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "k", "shards"),
    [(1, 8, 4, 4, 2, 1), (13, 16, 12, 16, 4, 4), (40, 32, 8, 64, 6, 8), (6, 8, 8, 7, 3, 3)],
)
def test_partials_of_all_shards_add_up_to_the_definition(
    tokens: int, hidden: int, width: int, experts: int, k: int, shards: int
) -> None:
    gate_up, down = bank(experts, hidden, width, seed=tokens)
    ids, weights = routing(tokens, experts, k, seed=shards)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(9))
    total = torch.zeros(tokens, hidden)
    for shard in range(shards):
        held = shard_experts(shard, shards, experts)
        rows, values = shard_partial(x, ids, weights, shard_of(gate_up, down, held))
        expected = [t for t in range(tokens) if any(int(e) in held for e in ids[t])]
        assert rows.tolist() == expected
        total[rows.long()] += values
    for t in range(tokens):
        out = torch.zeros(hidden)
        for e, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out += w * (down[e] @ (F.silu(gate) * up))
        assert torch.allclose(total[t], out, atol=TOLERANCE)


def test_all_tokens_to_one_expert_and_an_idle_shard() -> None:
    gate_up, down = bank(8, 16, 4, seed=1)
    ids = torch.full((5, 1), 6, dtype=torch.int32)
    weights = torch.ones(5, 1)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    busy = shard_partial(x, ids, weights, shard_of(gate_up, down, range(4, 8)))
    idle = shard_partial(x, ids, weights, shard_of(gate_up, down, range(4)))
    assert busy[0].tolist() == [0, 1, 2, 3, 4]
    assert idle[0].numel() == 0
    assert idle[1].shape == (0, 16)


class Made(TorchDispatchMode):
    """Bytes of the largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.nbytes)
        return made


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "rotated"])
def test_little_scratch_is_kept_to_and_changes_no_bit(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    shard = shard_of(*bank(16, 128, 128, seed=1, dtype=dtype), range(2, 14))
    if precision == "rotated":
        gate_up, down = (RotatedMatrices(tcq2(12, *shape)) for shape in ((256, 128), (128, 128)))
        shard = ShardWeights(first=2, gate_up=gate_up, down=down)
    ids, weights = routing(200, 16, 4, seed=2)
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    monkeypatch.setattr(cpu, "partial_of_few", lambda *_: None)  # whose scratch is not torch's
    with Made() as made:
        expected = shard_partial(x, ids, weights, shard)
    limit = 1 << 17
    assert made.largest > 2 * limit
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", limit)
    with Made() as made:
        found = shard_partial(x, ids, weights, shard)
    assert made.largest <= limit
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_products_and_sum_are_float32_in_bfloat16() -> None:
    gate_up, down = bank(4, 32, 16, seed=6, dtype=torch.bfloat16)
    ids, weights = routing(3, 4, 4, seed=7)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(8)).bfloat16()
    _, values = shard_partial(x, ids, weights, shard_of(gate_up, down, range(4)))
    expected = torch.zeros(3, 32)
    for expert in range(4):
        for t in range(3):
            k = ids[t].tolist().index(expert)
            gate, up = F.linear(x[t], gate_up[expert]).chunk(2)
            out = F.linear(F.silu(gate) * up, down[expert])
            expected[t] += out.float() * weights[t, k]
    assert values.dtype is torch.float32
    assert torch.allclose(values, expected, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_pairs", "width"), [(1, 6, 40), (9, 50, 33), (4, 1, 8)])
def test_combining_has_the_same_bits_with_and_without_a_compiler(
    num_rows: int,
    num_pairs: int,
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has no compiler may hold a replica; rows without a pair stay as they are."""
    generator = torch.Generator().manual_seed(num_pairs)
    results = torch.randn(num_pairs, width, generator=generator).to(dtype)
    weight = torch.rand(num_pairs, generator=generator)
    slot = torch.randint(num_rows, (num_pairs,), generator=generator)
    before = torch.randn(num_rows, width, generator=generator)
    found, expected = before.clone(), before.clone()
    pairs.combine(results, weight, slot, found)
    for pair in range(num_pairs):
        expected[slot[pair]] += weight[pair] * results[pair].float()
    assert torch.equal(found, expected)
    monkeypatch.setattr(native, "library", lambda: None)
    plain = before.clone()
    pairs.combine(results, weight, slot, plain)
    assert torch.equal(plain, expected)


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize("width", [1, 16, 35, 1536])
def test_swiglu_is_torchs_but_for_a_last_bit(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    gate_up = 6 * torch.randn(rows, 2 * width, generator=generator)
    special = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 1e-30])
    gate_up.view(-1)[:7] = special[: gate_up.numel()]
    gate_up = gate_up.bfloat16()
    gate, up = gate_up.chunk(2, dim=-1)
    found, expected = swiglu(gate_up), F.silu(gate) * up
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-30)
    assert (found != expected).sum() <= 0.01 * expected.numel()


@pytest.mark.parametrize(
    ("num_tokens", "k", "first", "num_experts"),
    [(1, 6, 0, 64), (40, 3, 8, 8), (5, 2, 12, 4), (7, 1, 0, 1)],
)
def test_pairs_are_the_same_with_and_without_a_compiler(
    num_tokens: int, k: int, first: int, num_experts: int
) -> None:
    ids, weights = routing(num_tokens, max(16, first + num_experts), k, seed=num_tokens)
    found = pairs.pairs_of(ids, weights, first, num_experts)
    expected = pairs.pairs_by_torch(ids, weights, first, num_experts)
    for name in ("rows", "token", "slot", "weight"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype is getattr(expected, name).dtype
    assert found.counts == expected.counts


def test_a_thread_that_has_done_nothing_yet_rounds_like_any_other() -> None:
    """In a process of its own, where OpenMP would like more threads than torch is told to take."""
    code = """
import threading
import torch
from chiasm.kernels.moe import ShardWeights, shard_partial
from chiasm.kernels.quant.formats import DenseMatrices
torch.set_num_threads(1)
make = torch.Generator().manual_seed(0)
experts, hidden, width, tokens = 8, 128, 96, 20
gate_up = torch.randn(experts, 2 * width, hidden, generator=make)
down = torch.randn(experts, hidden, width, generator=make)
weights = ShardWeights(first=0, gate_up=DenseMatrices(gate_up), down=DenseMatrices(down))
x = torch.randn(tokens, hidden, generator=make)
ids = torch.rand(tokens, experts, generator=make).topk(4).indices.int()
share = torch.rand(tokens, 4, generator=make)
found = [shard_partial(x, ids, share, weights)[1]]
thread = threading.Thread(target=lambda: found.append(shard_partial(x, ids, share, weights)[1]))
thread.start()
thread.join()
assert torch.equal(*found)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
