"""Whole experts of few rows in one call: the bits of one product after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quant.matrices import FORMATS

from chiasm.kernels import dense as products
from chiasm.kernels import native
from chiasm.kernels.moe import ShardWeights, cpu, few, reference, shard_partial
from chiasm.kernels.quant.cpu import most_rows, stack_of
from chiasm.kernels.quant.formats import DenseMatrices
from chiasm.kernels.quant.hadamard import RotatedMatrices

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a compiler")
FIRST, EXPERTS, TOP_K = 3, 9, 3
BFLOAT16_RATIO = 0.02


def bfloat16(experts: int, n: int, k: int, seed: int = 0) -> DenseMatrices:
    g = torch.Generator().manual_seed(seed)
    return DenseMatrices(torch.randn(experts, n, k, generator=g).bfloat16())


MADE = {**FORMATS, "bfloat16": bfloat16}


def dispatch(num_tokens: int, hidden: int, *, num_experts: int = 16) -> list[torch.Tensor]:
    """Hidden rows, ids and weights; `num_experts` are chosen from."""
    g = torch.Generator().manual_seed(num_tokens + hidden)
    ids = [torch.randperm(num_experts, generator=g)[:TOP_K] for _ in range(num_tokens)]
    return [
        torch.randn(num_tokens, hidden, generator=g).bfloat16(),
        torch.stack(ids).to(torch.int32),
        torch.rand(num_tokens, TOP_K, generator=g),
    ]


def shard(gate_up: str, down: str, hidden: int, width: int) -> ShardWeights:
    return ShardWeights(
        first=FIRST,
        gate_up=MADE[gate_up](EXPERTS, 2 * width, hidden, seed=1),
        down=MADE[down](EXPERTS, hidden, width, seed=2),
    )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each partial was computed in one call."""
    found: list[bool] = []
    ask = few.partial_of_few

    def spy(*given: object) -> object:
        partial = ask(*given)  # type: ignore[arg-type]
        found.append(partial is not None)
        return partial

    monkeypatch.setattr(cpu, "partial_of_few", spy)
    return found


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("hidden", "width"), [(128, 64), (384, 140), (132, 512), (1024, 700)])
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        *((name, name) for name in ("int8", "int4", "tcq2", "bfloat16")),
        ("int4", "tcq2"),
        ("bfloat16", "int8"),
    ],
)
def test_has_the_bits_of_one_product_after_another(
    gate_up: str,
    down: str,
    hidden: int,
    width: int,
    num_tokens: int,
    num_threads: int,
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, given = shard(gate_up, down, hidden, width), dispatch(num_tokens, hidden)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        rows, values = shard_partial(*given, weights)
    finally:
        torch.set_num_threads(before)
    matrices = (weights.gate_up, weights.down)
    most = min(most_rows(m, stack_of(m), given[0]) for m in matrices)
    is_dense = any(isinstance(m, DenseMatrices) for m in matrices)
    assert bool(most) == (native.has_bfloat16() or not is_dense)
    longest = torch.bincount(given[1].flatten())[FIRST : FIRST + EXPERTS].max()
    assert taken == [bool(longest <= most)]
    monkeypatch.setattr(cpu, "partial_of_few", lambda *_: None)
    expected_rows, expected = shard_partial(*given, weights)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(values, expected)
    assert values.abs().sum() > 0


@pytest.mark.parametrize("case", ["float32", "float32 matrices", "rotated", "many rows"])
def test_leaves_the_rest_alone(
    case: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "torch_has_bfloat16", lambda: True)  # or many rows are few
    weights, given = shard("int4", "int4", 128, 128), dispatch(2, 128)
    if case == "float32":
        given[0] = given[0].float()
    elif case == "float32 matrices":
        down = DenseMatrices(torch.randn(EXPERTS, 128, 128))
        weights, given[0] = replace(weights, down=down), given[0].float()
    elif case == "rotated":
        weights = replace(weights, down=RotatedMatrices(FORMATS["tcq2"](EXPERTS, 128, 128)))
    else:
        given = dispatch(200, 128)
    found = shard_partial(*given, weights)
    assert taken == [False]
    expected = reference.shard_partial(*given, weights)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).norm() < BFLOAT16_RATIO * expected[1].norm()


def test_what_does_not_fit_is_refused() -> None:
    weights = shard("int8", "int8", 128, 64)
    for hidden in (64, 256):
        with pytest.raises(ValueError, match=f"1, {hidden}.* of 128 columns"):
            shard_partial(*dispatch(1, hidden), weights)
    x, ids, share = dispatch(3, 128)
    for cut in ((x[:2], ids, share), (x, ids, share[:2]), (x, ids, share[:, :2])):
        with pytest.raises(ValueError, match="of 128 columns"):
            shard_partial(*cut, weights)
    wide = replace(weights, down=shard("int8", "int8", 128, 32).down)
    with pytest.raises(ValueError, match="of 128 rows, then of 32"):
        shard_partial(*dispatch(1, 128), wide)


def test_tokens_of_other_shards_alone(taken: list[bool]) -> None:
    rows, values = shard_partial(
        *dispatch(4, 128, num_experts=FIRST), shard("int8", "int8", 128, 64)
    )
    assert taken == [True]
    assert (len(rows), values.shape) == (0, (0, 128))
