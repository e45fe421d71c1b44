"""The trellis of tcq2: packing, and the search for the best path."""

from __future__ import annotations

import itertools

import pytest
import torch

from chiasm.kernels import native
from chiasm.kernels.quant import cpu, table, tcq2
from chiasm.kernels.quant.formats import per_weight


def problem(
    rows: int, k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights in units of their rows, local scales, importances and the table."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, k, generator=g) * 4000
    local = torch.randint(1, 256, (rows, -(-k // 128)), generator=g).to(torch.uint8)
    return weights, local, torch.rand(k, generator=g) + 0.1, table.load()


def cost(
    weights: torch.Tensor, local: torch.Tensor, heed: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """float64 [R] of the levels that paths chose."""
    value = levels.double() * per_weight(local.double(), weights.shape[1])
    return ((weights.double() - value).square() * heed.double()).sum(dim=1)


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    return table.load()[tcq2.states(codes)]


def walk(symbols: list[int]) -> list[int]:
    """States of a path, by the definition."""
    state, found = 0, []
    for symbol in symbols:
        state = ((state << 2) | symbol) & 255
        found.append(state)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bytes_hold_the_symbols_first_one_highest(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 4, (5, 64), generator=g)
    shifts = torch.tensor([6, 4, 2, 0])
    codes = (symbols.view(5, 16, 4) << shifts).sum(dim=-1).to(torch.uint8)
    expected = [walk(row) for row in symbols.tolist()]
    assert tcq2.states(codes).tolist() == expected


def test_an_encoded_matrix_is_the_walk_of_its_symbols() -> None:
    """From the bytes alone, by the definition: symbols, trellis, table, scales."""
    weight = torch.randn(1, 32, 2560, generator=torch.Generator().manual_seed(5))
    coded = tcq2.encode(weight)
    symbols = (coded.codes[0, :, :, None].int() >> torch.tensor([6, 4, 2, 0])) & 3
    states = torch.tensor([walk(row) for row in symbols.flatten(1).tolist()])  # [32, 2560]
    local = coded.local[0, :, torch.arange(2560) // 128].int()
    expected = (coded.table.int()[states] * local).float() * coded.row[0, :, None]
    assert torch.equal(coded.dequantize(0, torch.float32), expected)
    assert torch.equal(cpu.widened(coded, 0, torch.float32), expected)
    assert (expected - weight[0]).square().mean() < 0.081


@pytest.mark.usefixtures("any_processor")
@pytest.mark.parametrize(
    ("rows", "k", "seed"), [(33, 128, 0), (16, 200, 1), (7, 4, 2), (9, 516, 3)]
)
def test_the_compiled_search_takes_the_paths_of_the_reference(rows: int, k: int, seed: int) -> None:
    given = problem(rows, k, seed)
    assert torch.equal(tcq2.paths(*given), tcq2.reference_paths(*given))


@pytest.mark.usefixtures("any_processor")
def test_ties_are_broken_alike() -> None:
    weights, local, heed, levels = problem(6, 256, 4)
    local[:, 1] = 0  # every path costs the same there
    weights[0] = 0
    given = (weights, local, heed, levels)
    assert torch.equal(tcq2.paths(*given), tcq2.reference_paths(*given))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_no_other_path_is_better(seed: int) -> None:
    """Against all 4^8 paths: 256 lead into each of the states, and all but one are given up."""
    weights, local, heed, levels = problem(3, 8, seed)
    found = cost(weights, local, heed, levels_of(tcq2.paths(weights, local, heed, levels)))
    every = torch.tensor([walk(list(path)) for path in itertools.product(range(4), repeat=8)])
    best = torch.stack(
        [cost(weights[r : r + 1], local[r : r + 1], heed, levels[every]).min() for r in range(3)]
    )
    torch.testing.assert_close(found, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_better_than_the_nearest_level_at_every_step(seed: int) -> None:
    weights, local, heed, levels = problem(12, 256, seed)
    best = cost(weights, local, heed, levels_of(tcq2.paths(weights, local, heed, levels)))
    for row in range(12):
        state, greedy = 0, []
        for t in range(256):
            after = [((state << 2) | symbol) & 255 for symbol in range(4)]
            errors = (weights[row, t] - levels[after].float() * local[row, t // 128].float()).abs()
            state = after[int(errors.argmin())]
            greedy.append(state)
        theirs = cost(
            weights[row : row + 1], local[row : row + 1], heed, levels[torch.tensor([greedy])]
        )
        assert best[row] < theirs[0]


def test_without_a_compiler_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1, 12, 132, generator=torch.Generator().manual_seed(8))
    compiled = tcq2.encode(weight)
    monkeypatch.setattr(native, "library", lambda: None)
    plain = tcq2.encode(weight)
    for field in ("codes", "local", "row"):
        assert torch.equal(getattr(compiled, field), getattr(plain, field))


def test_the_search_stays_on_the_device_of_its_weights() -> None:
    """`meta` has no memory: to read it, or to mix it with the CPU's, fails."""
    given = [tensor.to("meta") for tensor in problem(6, 132, 5)]
    found = tcq2.paths(*given)
    assert (found.device.type, found.shape) == ("meta", (6, 33))
    weight = torch.empty(2, 6, 132, device="meta")
    for importance in (None, torch.empty(132, device="meta")):
        coded = tcq2.encode(weight, importance)
        tensors = (coded.codes, coded.local, coded.row, coded.table)
        assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
def test_a_gpu_takes_the_same_paths(seed: int) -> None:
    given = problem(70, 516, seed)
    found = tcq2.paths(*(tensor.cuda() for tensor in given))
    assert found.is_cuda
    assert torch.equal(found.cpu(), tcq2.paths(*given))
    weight = torch.randn(1, 40, 384, generator=torch.Generator().manual_seed(seed))
    mine, theirs = tcq2.encode(weight), tcq2.encode(weight.cuda())
    errors = [
        float((m.dequantize(0, torch.float32).cpu() - weight[0]).square().mean())
        for m in (mine, theirs)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)  # sums round otherwise there
