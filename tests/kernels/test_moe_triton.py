"""The Triton path of the routed experts against the reference; interpreted without a GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm import errors
from chiasm.kernels import moe
from chiasm.kernels.moe import (
    ShardWeights,
    configs,
    launch,
    permute,
    reference,
    scratch,
    transform,
)
from chiasm.kernels.moe.configs import Problem, Tile
from chiasm.kernels.moe.operands import Format, operands
from chiasm.kernels.quant.formats import (
    GROUP,
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
)
from chiasm.kernels.quant.hadamard import RotatedMatrices
from chiasm.kernels.quant.wint2 import Wint2Matrices

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Against results of the order of 1; the reference rounds to the dtype at every step."""

FORMATS: tuple[Format, ...] = ("dense", "int8", "int4", "tcq2")
GROUPED: tuple[Format, ...] = ("int4", "tcq2")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed out uninitialised holds NaN: whoever reads it before writing shows."""
    plain = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(0)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def matrices(
    format: Format, experts: int, rows: int, depth: int, dtype: torch.dtype, g: torch.Generator
) -> ExpertMatrices:
    """Random codes of weights with a standard deviation near depth^-0.5."""

    def uniform(*shape: int) -> torch.Tensor:
        return (0.5 + torch.rand(*shape, generator=g)) * depth**-0.5

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(DEVICE)

    groups = -(-depth // GROUP)
    if format == "dense":
        weight = torch.randn(experts, rows, depth, generator=g) * depth**-0.5
        return DenseMatrices(weight.to(DEVICE, dtype))
    if format == "int8":
        scale = uniform(experts, rows).to(DEVICE) / 74
        return Int8Matrices(codes(experts, rows, depth).view(torch.int8), scale)
    if format == "int4":
        scale = (uniform(experts, rows, groups) / 4.6).bfloat16().to(DEVICE)
        zero = scale * torch.randn(scale.shape, generator=g).to(DEVICE, torch.bfloat16)
        return Int4Matrices(codes(experts, rows, depth // 2), scale, zero)
    return Tcq2Matrices(
        codes(experts, rows, depth // 4),
        codes(experts, rows, groups),
        uniform(experts, rows).to(DEVICE) / (74 * 147),
        codes(256).view(torch.int8),
    )


class Case:
    """A dispatch to a bank of `experts`, of which a shard holds `held`."""

    def __init__(
        self,
        format: Format,
        *,
        tokens: int = 9,
        hidden: int = 128,
        width: int = 48,
        experts: int = 16,
        k: int = 4,
        held: range = range(4, 12),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weights = ShardWeights(
            first=held.start,
            gate_up=matrices(format, len(held), 2 * width, hidden, dtype, g),
            down=matrices(format, len(held), hidden, width, dtype, g),
        )
        self.hidden = torch.randn(tokens, hidden, generator=g).to(DEVICE, dtype)
        order = torch.rand(tokens, experts, generator=g).argsort(dim=1)
        self.ids = order[:, :k].to(DEVICE, torch.int32)
        self.expert_weights = torch.rand(tokens, k, generator=g).to(DEVICE)

    @property
    def dispatch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.expert_weights

    def triton(self) -> tuple[torch.Tensor, torch.Tensor]:
        return launch.shard_partial(*self.dispatch, self.weights)

    def assert_equals_reference(self) -> None:
        rows, values = self.triton()
        expected_rows, expected = reference.shard_partial(*self.dispatch, self.weights)
        assert rows.dtype is torch.int32
        assert torch.equal(rows, expected_rows)
        assert values.dtype is torch.float32
        assert values.shape == expected.shape
        if values.numel():
            assert (values - expected).abs().max() <= TOLERANCE[self.hidden.dtype]


SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "hidden": 256, "held": range(16)},
    "ragged": {"tokens": 17, "experts": 5, "k": 3, "held": range(3)},
    "middle of the bank": {"tokens": 7, "experts": 64, "k": 6, "held": range(24, 32), "seed": 1},
    "short last group": {"hidden": 140, "width": 36, "k": 3, "held": range(9, 16)},
    "one expert of one": {"tokens": 3, "experts": 1, "k": 1, "held": range(1), "width": 32},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_reference(format: Format, shape: str) -> None:
    Case(format, **SHAPES[shape]).assert_equals_reference()


@pytest.mark.parametrize("format", FORMATS)
def test_equals_reference_in_float16(format: Format) -> None:
    Case(format, dtype=torch.float16, seed=2).assert_equals_reference()


@pytest.mark.parametrize("format", ["dense", "int8"])
def test_equals_reference_at_odd_sizes(format: Format) -> None:
    Case(format, hidden=77, width=33, seed=3).assert_equals_reference()


@pytest.mark.parametrize("format", ["dense", "tcq2"])
def test_rotated_matrices_equal_reference(format: Format) -> None:
    case = Case(format, hidden=256, width=128, tokens=6, seed=4)
    case.weights = ShardWeights(
        first=case.weights.first,
        gate_up=RotatedMatrices(case.weights.gate_up),
        down=RotatedMatrices(case.weights.down),
    )
    case.assert_equals_reference()


@pytest.mark.parametrize("seed", range(8))
def test_equals_reference_on_random_dispatches(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    experts = drawn(2, 24)
    first = drawn(0, experts)
    Case(
        FORMATS[seed % 4],
        tokens=drawn(1, 18),
        hidden=4 * drawn(8, 65),
        width=4 * drawn(4, 25),
        experts=experts,
        k=drawn(1, min(experts, 6) + 1),
        held=range(first, drawn(first + 1, experts + 1)),
        seed=seed,
    ).assert_equals_reference()


@pytest.mark.parametrize("format", FORMATS)
def test_no_token_no_expert_of_the_shard_and_all_tokens_to_one(format: Format) -> None:
    case = Case(format, tokens=5)
    for ids in (case.ids[:0], torch.full_like(case.ids, 3), torch.full_like(case.ids, -1)):
        rows, values = launch.shard_partial(
            case.hidden[: len(ids)], ids, case.expert_weights[: len(ids)], case.weights
        )
        assert rows.shape == (0,)
        assert values.shape == (0, 128)
    case.ids[:] = torch.tensor([7, 0, 1, 2], device=DEVICE)
    case.assert_equals_reference()
    case.ids[:] = torch.tensor([7, 7, 15, 6], device=DEVICE)  # one expert twice
    case.assert_equals_reference()


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decodes_to_the_reference_weights(format: Format, dtype: torch.dtype) -> None:
    """Exactly; and leaves out experts without pairs."""
    g = torch.Generator().manual_seed(4)
    stored = matrices(format, 3, 40, 140, dtype, g)
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    found = transform.dequantise(operands(stored), starts, dtype).codes
    for expert in (0, 2):
        assert torch.equal(found[expert], stored.dequantize(expert, dtype))
    assert found[1].isnan().all()


@pytest.mark.parametrize("format", GROUPED)
def test_many_tokens_take_decoded_weights(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(format, tokens=17, hidden=200, width=36, experts=4, held=range(1, 4), k=3)
    monkeypatch.setattr(launch, "DENSE_TOKENS", launch.tokens_per_expert((13, 13, 12)) + 1)
    monkeypatch.setattr(launch, "dequantise", lambda *_: pytest.fail("decoded for few tokens"))
    case.assert_equals_reference()
    monkeypatch.undo()
    monkeypatch.setattr(launch, "DENSE_TOKENS", 2)
    case.assert_equals_reference()
    mixed = replace(
        case.weights, down=Case("int8", hidden=200, width=36, held=range(3)).weights.down
    )
    case.weights = mixed
    case.assert_equals_reference()


@pytest.mark.parametrize("format", ["dense", "int4"])
def test_little_scratch_changes_no_bit(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(format, tokens=12, held=range(2, 12), seed=5)
    monkeypatch.setattr(launch, "DENSE_TOKENS", 1)
    rows, values = case.triton()
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 6_000)
    stored = operands(case.weights.gate_up), operands(case.weights.down)
    counts = permuted(case.ids, case.weights).counts
    groups = launch.groups(counts, *stored, torch.float32, is_decoded=True)
    assert len(list(groups)) > 2
    again = case.triton()
    assert torch.equal(again[0], rows)
    assert torch.equal(again[1], values)


@pytest.mark.parametrize("is_decoded", [False, True])
def test_groups_hold_all_pairs_and_as_little_else_as_can_be(
    is_decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator()
    gate_up, down = (operands(matrices("int4", 20, n, 32, torch.float32, g)) for n in (64, 32))
    pair_bytes, expert_bytes = 32 * 4 + 32 * 4, 64 * 32 * 4 * is_decoded
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, 40, (20,), generator=g) - 15
        counts = tuple(drawn.clamp(min=0).tolist())
        limit = 2_000 * (1 + seed)
        monkeypatch.setattr(scratch, "SCRATCH_BYTES", limit)
        found = list(launch.groups(counts, gate_up, down, torch.float32, is_decoded=is_decoded))
        held = [expert for group in found for expert in group]
        assert held == sorted(set(held))
        assert sum(counts[expert] for expert in held) == sum(counts)
        for group in found:
            assert counts[group[0]]
            assert counts[group[-1]]
            used = len(group) * expert_bytes + sum(counts[e] for e in group) * pair_bytes
            assert used <= limit or len(group) == 1


def permuted(ids: torch.Tensor, weights: ShardWeights) -> permute.Permutation:
    return permute.permute(ids, first_expert=weights.first, num_experts=weights.num_experts)


def test_other_shards_tokens_change_no_bit() -> None:
    """A server that holds more shards gets more rows; each shard's answer stays what it was."""
    case = Case("dense", tokens=6, seed=6)
    rows, values = case.triton()
    spread = torch.arange(6, device=DEVICE) * 2 + 1
    hidden = torch.full((13, 128), float("nan"), device=DEVICE)
    ids = torch.full((13, 4), 15, dtype=torch.int32, device=DEVICE)
    expert_weights = torch.full((13, 4), float("nan"), device=DEVICE)
    for wide, narrow in zip((hidden, ids, expert_weights), case.dispatch, strict=True):
        wide[spread] = narrow
    found_rows, found = launch.shard_partial(hidden, ids, expert_weights, case.weights)
    assert torch.equal(found_rows, spread[rows.long()].int())
    assert torch.equal(found, values)


def test_measured_tiles_take_the_place_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.load.cache_clear()
    request.addfinalizer(configs.load.cache_clear)
    case = Case("dense", tokens=17, hidden=96, experts=4, held=range(4), k=2)
    gpu = launch.name_of(DEVICE)
    few = Tile(block_m=16, block_n=32, block_k=32, num_warps=2, num_stages=2)
    many = Tile(block_m=32, block_n=16, block_k=16, num_warps=2, num_stages=1)
    problem = Problem(operation="gate_up", format="dense", dtype=torch.float32, shape=(96, 96))
    gate_up, down = problem, replace(problem, operation="down", shape=(96, 48))
    configs.save(gpu, [(gate_up, {4: many, 2: few})])
    path = configs.save(gpu, [(down, {16: few})])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert [configs.choose(gpu, gate_up, n) for n in (1, 2, 3, 4, 9)] == [few, few, *[many] * 3]
    assert configs.choose(gpu, down, 1) == few
    assert configs.choose("another", gate_up, 3) == configs.default_tile(gate_up, 3)
    case.assert_equals_reference()


def test_what_does_not_fit_together_is_refused_before_it_runs() -> None:
    case, wider = Case("dense"), Case("dense", width=32)
    hidden, ids, expert_weights = case.dispatch
    mixed = ShardWeights(first=0, gate_up=case.weights.gate_up, down=wider.weights.down)
    strided = DenseMatrices(operands(case.weights.gate_up).codes.transpose(1, 2))
    short = Int8Matrices(torch.zeros(8, 96, 128, dtype=torch.int8), torch.zeros(8, 95))
    for bad in [
        (hidden.double(), ids, expert_weights, case.weights),
        (hidden.half(), ids, expert_weights, case.weights),
        (hidden[:, :64], ids, expert_weights, case.weights),
        (hidden[:5], ids, expert_weights, case.weights),
        (hidden, ids.long(), expert_weights, case.weights),
        (hidden, ids, expert_weights[:, :3], case.weights),
        (hidden, ids, expert_weights.half(), case.weights),
        (hidden, ids, expert_weights, mixed),
        (hidden, ids, expert_weights, ShardWeights(first=0, gate_up=strided, down=strided)),
        (hidden, ids, expert_weights, ShardWeights(first=0, gate_up=short, down=short)),
    ]:
        with pytest.raises(errors.Internal):
            launch.shard_partial(*bad)


def test_what_autograd_must_follow_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "is_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    case = Case("dense", tokens=3)
    hidden = case.hidden.clone().requires_grad_()
    rows, values = moe.shard_partial(hidden, case.ids, case.expert_weights, case.weights)
    values.sum().backward()
    assert hidden.grad is not None
    monkeypatch.setattr(reference, "shard_partial", lambda *_: "reference")
    again, _ = moe.shard_partial(*case.dispatch, case.weights)
    assert torch.equal(again, rows)
    no_kernels = Wint2Matrices(*[torch.empty(8)] * 5)
    weights = ShardWeights(first=0, gate_up=case.weights.gate_up, down=no_kernels)
    assert not launch.is_supported(weights)
    with pytest.raises(errors.Internal, match="Wint2Matrices"):
        launch.shard_partial(*case.dispatch, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 33, 1500])
@pytest.mark.parametrize("width", [512, 1536])
def test_equals_reference_in_bfloat16_at_full_size(format: Format, tokens: int, width: int) -> None:
    case = Case(
        format,
        tokens=tokens,
        hidden=2560,
        width=width,
        experts=64,
        k=6,
        held=range(16, 32),
        dtype=torch.bfloat16,
    )
    case.assert_equals_reference()
    assert torch.equal(case.triton()[1], case.triton()[1])


def test_kernels_compile(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_moe.py")
    cases = ["80,bf16,tcq2,32", "90,bf16,int4,1", "90,bf16,dense,64", "80,bf16,rest,0"]
    done = subprocess.run(
        [sys.executable, "-P", script, *cases],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
