"""The compiled products and decoders against the formats' own definition."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processors import be_processor
from quant.matrices import FORMATS, ODD_SHAPES, SHAPES
from structlog.testing import capture_logs
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.kernels import dense as products
from chiasm.kernels import native
from chiasm.kernels.native import build
from chiasm.kernels.quant import cpu
from chiasm.kernels.quant.formats import (
    CodedMatrices,
    DenseMatrices,
    ExpertMatrices,
    Tcq2Matrices,
)

# A result is rounded to bfloat16, by up to 2^-8 of itself; so are weights where they are widened.
LINEAR_TOLERANCE = 8e-3
ROWS = (1, 2, 3, 5, 9, 17, 40, 65)


@pytest.fixture(params=["this processor", "no tiles", "AVX2", "any processor", "no compiler"])
def any_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no compiler":
        monkeypatch.setattr(native, "library", lambda: None)
    elif request.param == "no tiles":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
    else:
        assert native.library() is not None
        be_processor(request.param, monkeypatch)


def inputs(rows: int, k: int, seed: int, *, outlier: bool = True) -> torch.Tensor:
    """With an outlier among them, as activations have."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[:, seed % k] *= 100
    return x.bfloat16()


def dense(experts: int, n: int, k: int) -> DenseMatrices:
    g = torch.Generator().manual_seed(n)
    return DenseMatrices(torch.randn(experts, n, k, generator=g).bfloat16())


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Element by element: found is x @ weight^T but for roundings to bfloat16, of each result and,
    independently of each other, of weights."""
    x, weight = x.double(), weight.double()
    exact, spread = x @ weight.t(), ((x * x) @ (weight * weight).t()).sqrt()
    bound = 2**-8 * exact.abs() + 2**-7 * spread
    assert ((found.double() - exact).abs() <= bound).all()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_is_the_definition_bit_for_bit(name: str, shape: tuple[int, int, int]) -> None:
    matrices = FORMATS[name](*shape, seed=sum(shape))
    for expert in range(shape[0]):
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(
                cpu.widened(matrices, expert, dtype), matrices.dequantize(expert, dtype)
            )


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize("shape", [*SHAPES, None], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, shape: tuple[int, int, int] | None) -> None:
    shape = shape or ODD_SHAPES[name]
    matrices = FORMATS[name](*shape, seed=sum(shape))
    for expert in range(shape[0]):
        weight = matrices.dequantize(expert, torch.float32)
        for rows in ROWS:
            x = inputs(rows, shape[2], seed=rows, outlier=rows % 2 == 0)
            assert_product(matrices.linear(x, expert), x, weight)


@pytest.mark.parametrize("name", FORMATS)
def test_float32_products_are_those_of_the_widened_matrix(name: str) -> None:
    matrices = FORMATS[name](2, 24, 256, seed=1)
    x = inputs(5, 256, seed=2).float()
    expected = x.double() @ matrices.dequantize(1, torch.float32).double().t()
    assert relative_error(matrices.linear(x, 1), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_other_devices(name: str, dtype: torch.dtype) -> None:
    matrices = FORMATS[name](2, 24, 256, seed=1)
    assert isinstance(matrices, CodedMatrices)
    x = inputs(5, 256, seed=2).to(dtype)
    found = matrices.widened_linear(x, 1)
    expected = x.double() @ matrices.dequantize(1, torch.float32).double().t()
    assert found.dtype is dtype
    assert relative_error(found, expected) <= (1e-6 if dtype is torch.float32 else LINEAR_TOLERANCE)


class Float32Made(TorchDispatchMode):
    """Elements of the largest float32 tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype is torch.float32:
            self.largest = max(self.largest, made.numel())
        return made


def test_int8_makes_no_matrix_of_float32_on_other_devices() -> None:
    matrices = FORMATS["int8"](2, 24, 256, seed=1)
    assert isinstance(matrices, CodedMatrices)
    x = inputs(5, 256, seed=2)
    with Float32Made() as made:
        matrices.widened_linear(x, 1)
    assert made.largest == 5 * 24


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    matrices = FORMATS[name](1, 701, 384, seed=3)  # so large that threads share it
    x = inputs(min(cpu.MAX_UNTILED_ROWS.values()), 384, seed=4)
    together = matrices.linear(x, 0)
    assert torch.equal(together, torch.cat([matrices.linear(row[None], 0) for row in x]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(together, matrices.linear(x, 0))
    torch.set_num_threads(threads)


@pytest.mark.skipif(not native.has_tiles(), reason="no tiles in this processor")
@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_a_row_of_many_does_not_depend_on_the_others(name: str) -> None:
    """Only on whether they are many."""
    matrices = dense(2, 150, 320) if name == "dense" else FORMATS[name](2, 150, 320, seed=3)
    x = inputs(81, 320, seed=4)
    together = cpu.linear(matrices, x, 1)
    for begin, end in ((0, 11), (11, 27), (27, 60), (60, 81)):
        assert torch.equal(cpu.linear(matrices, x[begin:end], 1), together[begin:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(cpu.linear(matrices, x, 1), together)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize("name", FORMATS)
def test_runs_are_multiplied_with_their_own_expert(name: str) -> None:
    """Runs of few rows and of many, out of order, rows of x used more than once."""
    matrices = FORMATS[name](5, 20, 128, seed=5)
    x = inputs(60, 128, seed=6)
    index = torch.randint(0, 60, (64,), generator=torch.Generator().manual_seed(7))
    ends = [3, 4, 60, 64]
    runs = cpu.Runs(
        experts=(4, 0, 2, 1), begin=[0, *ends[:-1]], end=ends, index=index.to(torch.int32)
    )
    found = cpu.grouped_linear(matrices, x, runs)
    for expert, begin, end in zip(runs.experts, runs.begin, runs.end, strict=True):
        weight = matrices.dequantize(expert, torch.float32).double()
        expected = x[index[begin:end]].double() @ weight.t()
        assert relative_error(found[begin:end], expected) <= LINEAR_TOLERANCE


def test_only_rows_of_runs_of_few_rows_are_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go through a widened matrix alone are not laid out for the compiled products."""
    library, num_rows = native.library(), []
    assert library is not None
    monkeypatch.setattr(products, "torch_has_bfloat16", lambda: True)
    matrices, x = FORMATS["int8"](3, 20, 128, seed=5), inputs(60, 128, seed=6)
    index = torch.tensor([*range(1, 60), 7, 3, 0, 7], dtype=torch.int32)
    runs = cpu.Runs(experts=(0, 1, 2), begin=(0, 59, 61), end=(59, 61, 63), index=index)
    apart = [
        matrices.linear(x[index[b:e]], i) for i, b, e in ((0, 0, 59), (1, 59, 61), (2, 61, 63))
    ]

    class Seen:
        def chiasm_linear(self, *args: Any) -> None:
            num_rows.append(args[2].value)
            library.chiasm_linear(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

    monkeypatch.setattr(native, "library", Seen)
    assert torch.equal(cpu.grouped_linear(matrices, x, runs), torch.cat(apart))
    assert num_rows == [3]


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_no_rows_make_no_rows(name: str, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 24, 256, dtype=dtype)
    matrices = DenseMatrices(weight) if name == "dense" else FORMATS[name](2, 24, 256, seed=1)
    assert cpu.linear(matrices, torch.empty(0, 256, dtype=dtype), 1).shape == (0, 24)


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 33)], ids=str)
def test_products_with_bfloat16_matrices(shape: tuple[int, int, int]) -> None:
    matrices = dense(*shape)
    for rows in ROWS:
        x = inputs(rows, shape[2], seed=rows, outlier=rows % 2 == 0)
        assert_product(cpu.linear(matrices, x, 1 % shape[0]), x, matrices.weight[1 % shape[0]])


@pytest.mark.skipif(not native.has_tiles(), reason="no tiles in this processor")
@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_tiles_write_their_own_rows_only(name: str) -> None:
    """Runs of one row, of whole tiles, of none; a row that is no number; memory behind the last."""
    matrices = dense(3, 70, 140) if name == "dense" else FORMATS[name](3, 70, 140, seed=3)
    x = inputs(40, 140, seed=4, outlier=False)
    x[7] = torch.nan
    index = torch.randperm(40, generator=torch.Generator().manual_seed(5)).to(torch.int32)
    runs = [(1, 0, 1), (0, 1, 17), (2, 17, 17), (2, 17, 35)]
    held = torch.full((40, 70), 7.0, dtype=torch.bfloat16)
    stack = cpu.stack_of(matrices)
    assert stack is not None
    products.multiply_by_tiles(stack, x, products.lists(runs), index, held)
    assert (held[35:] == 7).all()
    for expert, begin, end in runs:
        rows = [i for i in range(begin, end) if index[i] != 7]
        weight = matrices.dequantize(expert, torch.float32)
        assert_product(held[rows], x[index[rows]], weight)
    assert torch.equal(held[:35].isnan().all(dim=1), index[:35] == 7)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="128"):
        cpu.linear(FORMATS["int8"](1, 8, 256, seed=1), inputs(2, 128, seed=1), 0)


@pytest.mark.parametrize("name", FORMATS)
def test_silent_and_tiny_inputs(name: str) -> None:
    matrices = FORMATS[name](1, 16, 256, seed=8)
    x = torch.zeros(3, 256)
    x[1] = 1e-20
    x[2, 130] = 3.0
    found = matrices.linear(x.bfloat16(), 0)
    expected = x.bfloat16().double() @ matrices.dequantize(0, torch.float32).double().t()
    assert not found[0].any()
    for row in (1, 2):
        assert relative_error(found[row], expected[row]) <= LINEAR_TOLERANCE


@pytest.mark.parametrize("row", [1e-34, 1e-8, 1.0, 1e30])
def test_scales_at_the_ends_of_float32(row: float) -> None:
    given = FORMATS["tcq2"](1, 6, 256, seed=9)
    assert isinstance(given, Tcq2Matrices)
    matrices: ExpertMatrices = Tcq2Matrices(
        given.codes, given.local, torch.full_like(given.row, row), given.table
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(cpu.widened(matrices, 0, dtype), matrices.dequantize(0, dtype))


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []

    def compile_to(compiler: str, flags: list[str], path: Path) -> None:
        compiled.append(path)
        path.write_bytes(b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_to)
    first, again = build.compiled(), build.compiled()
    other = build.compiled(("-DOTHER",))
    assert first == again != other
    assert compiled == [first, other]
    assert first.is_relative_to(tmp_path / "chiasm" / "native")


def test_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build.compiled().read_bytes()
    attempts = [b"", whole]

    def compile_to(compiler: str, flags: list[str], path: Path) -> None:
        path.write_bytes(attempts.pop(0))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_to)
    build.library.cache_clear()
    try:
        assert build.library() is not None
    finally:
        build.library.cache_clear()
    assert not attempts
    assert build.compiled().read_bytes() == whole


def test_without_a_compiler_the_log_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    build.library.cache_clear()
    with capture_logs() as logs:
        assert build.library() is None
        assert build.library() is None
    build.library.cache_clear()
    assert [entry["event"] for entry in logs] == ["native_kernels_unavailable"]


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise subprocess.CalledProcessError(1, "c++", stderr=b"linear.cpp:1: wrong\nmore")

    monkeypatch.setattr(build, "compiled", fail)
    build.library.cache_clear()
    with capture_logs() as logs:
        assert build.library() is None
    build.library.cache_clear()
    assert logs[0]["error"] == "linear.cpp:1: wrong"
