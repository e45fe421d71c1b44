"""Routed experts on a GPU: every format against the memory's limit and torch's grouped product.

`python -m benchmarks.moe_gpu` writes benchmarks/results/moe_gpu.json. With `--tune` it measures
tile sizes first and writes the GPU's file in kernels/moe/configs. The banks are the published
model's, with random codes: speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import documents
from chiasm.bench import machine
from chiasm.kernels.moe import ShardWeights, configs, launch
from chiasm.kernels.moe.configs import Problem, Tile
from chiasm.kernels.moe.operands import GROUPED, Format, operands
from chiasm.kernels.moe.permute import permute
from chiasm.kernels.quant.formats import (
    GROUP,
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
    num_groups,
)

HIDDEN, NUM_EXPERTS, TOP_K = 2560, 64, 6
WIDTHS = {"text": 1536, "vision": 512}
FORMATS: tuple[Format, ...] = ("dense", "int8", "int4", "tcq2")
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
TOKENS_PER_EXPERT = (1, 16, 32, 64, 128, 512)
"""For which tiles are measured."""

WARM_UPS, REPEATS = 3, 20
COPY_BYTES = 1 << 30

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a piece of work takes on the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; limit_share: of the time that reading the weights alone would take."""

    bank: str
    format: Format
    tokens: int
    us: float
    teraflops: float
    limit_share: float
    torch_us: float | None


def seconds(work: Callable[[], object]) -> float:
    """Median over REPEATS. The cache is emptied before each, as other layers would."""
    spoiler = torch.empty(COPY_BYTES // 4, dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(WARM_UPS + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spoiler.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found[WARM_UPS:])


def bank(format: Format, width: int, device: torch.device) -> ShardWeights:
    """A whole bank as one shard."""
    gate_up = random_matrices(format, 2 * width, HIDDEN, device)
    return ShardWeights(
        first=0, gate_up=gate_up, down=random_matrices(format, HIDDEN, width, device)
    )


def random_matrices(format: Format, rows: int, depth: int, device: torch.device) -> ExpertMatrices:
    """Of weights about as large as a model's, so that nothing overflows."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device) * depth**-0.5

    outer, groups = (NUM_EXPERTS, rows), num_groups(depth)
    match format:
        case "dense":
            return DenseMatrices(scales(*outer, depth).bfloat16())
        case "int8":
            return Int8Matrices(codes(*outer, depth).view(torch.int8), scales(*outer) / 74)
        case "int4":
            scale = (scales(*outer, groups) / 5).bfloat16()
            return Int4Matrices(codes(*outer, depth // 2), scale, scale / 4)
        case "tcq2":
            table = codes(256).view(torch.int8)
            row = scales(*outer) / (74 * 147)
            return Tcq2Matrices(codes(*outer, depth // 4), codes(*outer, groups), row, table)


def dispatch(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights; the choices are uniform."""
    hidden = torch.randn(tokens, HIDDEN, device=device).bfloat16()
    ids = torch.rand(tokens, NUM_EXPERTS, device=device).argsort(dim=1)[:, :TOP_K].int()
    return hidden, ids.contiguous(), torch.rand(tokens, TOP_K, device=device)


def with_torch(
    hidden: torch.Tensor, ids: torch.Tensor, expert_weights: torch.Tensor, weights: ShardWeights
) -> torch.Tensor:
    """The same by torch's own kernels, for dense experts; sums in no fixed order."""
    gate_up, down = (operands(m).codes.transpose(1, 2) for m in (weights.gate_up, weights.down))
    expert, order = torch.sort(ids.flatten(), stable=True)
    ends = torch.bincount(expert, minlength=NUM_EXPERTS).cumsum(0).int()
    token = order // ids.shape[1]
    gate, up = torch._grouped_mm(hidden[token], gate_up, offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down, offs=ends)
    total = torch.zeros(hidden.shape, device=hidden.device)
    return total.index_add_(0, token, out.float() * expert_weights.flatten()[order, None])


def copy_bytes_per_s() -> float:
    """What the memory gives a plain copy, reading and writing counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def compare(report: Callable[[str], None]) -> dict[str, object]:
    """Every bank, format and number of tokens."""
    device, rows = torch.device("cuda"), []
    bytes_per_s = copy_bytes_per_s()
    report(f"copy: {bytes_per_s / 1e9:.0f} GB/s")
    for (name, width), format in itertools.product(WIDTHS.items(), FORMATS):
        weights = bank(format, width, device)
        for tokens in TOKENS:
            row = replace(_measure(weights, tokens, format, bytes_per_s), bank=name)
            rows.append(row)
            report(
                f"{name:6} {format:5} {tokens:5d} tokens: {row.us:8.0f} us, "
                f"{row.teraflops:6.1f} Tflop/s, {row.limit_share:5.1%} of the memory's limit"
                + (f", torch {row.torch_us:8.0f} us" if row.torch_us else "")
            )
    return {"copy_bytes_per_s": bytes_per_s, "shard_partial": [asdict(row) for row in rows]}


def _measure(weights: ShardWeights, tokens: int, format: Format, bytes_per_s: float) -> Row:
    given = dispatch(tokens, torch.device("cuda"))
    taken = seconds(lambda: launch.shard_partial(*given, weights))
    num_bytes = weights.gate_up.nbytes + weights.down.nbytes
    active = given[1].unique().numel()
    weights_of_one = sum(m.shape[0] * m.shape[1] for m in (weights.gate_up, weights.down))
    is_dense = format == "dense"
    by_torch = seconds(lambda: with_torch(*given, weights)) if is_dense else None
    return Row(
        bank="",
        format=format,
        tokens=tokens,
        us=taken * 1e6,
        teraflops=2 * tokens * TOP_K * weights_of_one / taken / 1e12,
        limit_share=num_bytes * active / NUM_EXPERTS / bytes_per_s / taken,
        torch_us=by_torch * 1e6 if by_torch else None,
    )


def candidates(format: Format, tokens_per_expert: int) -> Iterator[Tile]:
    """Tiles worth a try; what a GPU cannot hold is found out by trying."""
    tallest = 32 if format in GROUPED else 128
    needed = max(16, 1 << (tokens_per_expert - 1).bit_length())
    heights = [m for m in (16, 32, 64, 128) if m <= min(tallest, needed)]
    depths = (GROUP,) if format in GROUPED else (64, 128)
    for m, n, k, warps, stages in itertools.product(
        heights[-2:], (32, 64, 128, 256), depths, (4, 8), (3, 4)
    ):
        if m * n <= 128 * 32 * warps:  # the sums of a thread fit 128 registers
            yield Tile(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)


def tune(
    weights: ShardWeights, tokens_per_expert: int, time: Timer
) -> Iterator[tuple[Problem, Tile, float]]:
    """The fastest tile for each of the two products, with its seconds."""
    from triton.runtime.errors import OutOfResources, PTXASError

    gate_up, down = operands(weights.gate_up), operands(weights.down)
    device = gate_up.codes.device
    tokens = max(1, tokens_per_expert * NUM_EXPERTS // TOP_K)
    hidden, ids, expert_weights = dispatch(tokens, device)
    found = permute(ids, first_expert=0, num_experts=NUM_EXPERTS)
    call = launch.Call(permutation=found, experts=range(NUM_EXPERTS), top_k=TOP_K)
    inner = launch.run_gate_up(hidden, gate_up, call)
    runs: dict[configs.Operation, Callable[[Tile], object]] = {
        "gate_up": lambda tile: launch.run_gate_up(hidden, gate_up, call, tile=tile),
        "down": lambda tile: launch.run_down(inner, expert_weights, down, call, tile=tile),
    }
    for operation, run in runs.items():
        matrices = gate_up if operation == "gate_up" else down
        taken: dict[Tile, float] = {}
        for tile in candidates(matrices.format, tokens_per_expert):
            try:
                taken[tile] = time(lambda run=run, tile=tile: run(tile))  # type: ignore[misc]  # bound early
            except (OutOfResources, PTXASError):
                continue
        problem = Problem(
            operation=operation, format=matrices.format, dtype=hidden.dtype, shape=matrices.shape
        )
        best = min(taken, key=taken.__getitem__)
        yield problem, best, taken[best]


def tune_all(report: Callable[[str], None]) -> Path:
    """Every bank, format and number of tokens per expert; returns the file."""
    device = torch.device("cuda")
    measured: dict[Problem, dict[int, Tile]] = {}
    for width, format in itertools.product(WIDTHS.values(), FORMATS):
        weights = bank(format, width, device)
        most = launch.DENSE_TOKENS if format in GROUPED else max(TOKENS_PER_EXPERT)
        for tokens in (n for n in TOKENS_PER_EXPERT if n <= most):
            for problem, tile, taken in tune(weights, tokens, seconds):
                measured.setdefault(problem, {})[tokens] = tile
                report(f"{problem.key}, {tokens} tokens: {taken * 1e6:.0f} us with {tile}")
    return configs.save(launch.name_of(device), measured.items())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="measure tile sizes first")
    tunes = parser.parse_args().tune
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    _say(json.dumps(machine.describe()))
    with torch.inference_mode():
        if tunes:
            _say(f"wrote {tune_all(_say)}")
        with documents.measuring("moe_gpu") as document:
            document["result"] = compare(_say)


if __name__ == "__main__":
    main()
