"""Routed experts by precision: how much of memory's and of the matrix product's rate they reach.

One layer at the published geometry: 64 experts of hidden 2560 and the text or vision bank's width,
6 of them a token. Decode reads the chosen experts' weights once for a few tokens, so it is held
against the rate at which this machine reads memory; prefill computes, so it is held against
torch's products with as many rows, and with so many that nothing but computing counts: in bfloat16,
or in float32 on processors for which torch has no bfloat16. All of them are timed in turns, and a
ratio is the median of those of the turns: a shared machine's rates are others a second later.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from chiasm.kernels import native
from chiasm.kernels.dense import torch_has_bfloat16
from chiasm.kernels.moe import ShardWeights, pairs, shard_partial
from chiasm.kernels.quant import table, tcq2
from chiasm.kernels.quant.cpu import Runs, grouped_linear
from chiasm.kernels.quant.formats import (
    DenseMatrices,
    ExpertMatrices,
    Int4Matrices,
    Int8Matrices,
    Tcq2Matrices,
    num_groups,
)

HIDDEN, EXPERTS, TOP_K = 2560, 64, 6
WIDTHS = {"text": 1536, "vision": 512}
DECODE = (1, 8, 32)
PREFILL = (512, 2048)
LARGE_ROWS = 2048
REPEATS = 9
MATRICES = 6
"""That a product is taken with in turn, so that no cache holds them."""
CACHED_RUNS = 50
READ_BYTES = 1 << 30


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Times every precision, bank and batch; returns rates and ratios."""
    data = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    bandwidth = READ_BYTES / _median(data.sum)
    report(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {torch.get_num_threads()} threads")
    report(f"compiled kernels: {'yes' if native.library() is not None else 'no'}")
    plain = torch.bfloat16 if torch_has_bfloat16() else torch.float32
    report(f"plain products: {plain}")
    rows: list[dict[str, object]] = []
    rates: list[dict[str, object]] = []
    for bank, width in WIDTHS.items():
        matrices = torch.randn(MATRICES, 2 * width, HIDDEN).to(plain)
        for precision, make in _FORMATS.items():
            weights = ShardWeights(
                first=0, gate_up=make(2 * width, HIDDEN), down=make(HIDDEN, width)
            )
            cached = _cached_rate(weights.down)
            report(
                f"{bank:6s} {precision:8s} from the cache: {cached / bandwidth:5.0%} of bandwidth"
            )
            rates.append({"bank": bank, "precision": precision, "bytes_per_s": cached})
            for tokens in (*DECODE, *PREFILL):
                row = _measure(weights, tokens, data, matrices)
                rows.append({"bank": bank, "precision": precision, "tokens": tokens, **row})
                report(_line(rows[-1]))
    return {
        "read_bytes_per_s": bandwidth,
        "plain_products": str(plain),
        "rows": rows,
        "from_cache": rates,
        "combine": _combine_gain(report),
        "encode": _encode_rate(report),
    }


def _measure(
    weights: ShardWeights, tokens: int, data: torch.Tensor, matrices: torch.Tensor
) -> dict[str, float]:
    """A dispatch of so many tokens, and what it is held against: READ_BYTES of data that are read,
    and products with matrices."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    first = scores.topk(TOP_K).indices.to(torch.int32)
    # Other experts every time, or caches would hold those of a single token.
    turns = itertools.cycle((first + TOP_K * turn) % EXPERTS for turn in range(EXPERTS // TOP_K))
    hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    share = torch.full((tokens, TOP_K), 1 / TOP_K)
    num_chosen = len(set(first.flatten().tolist()))
    # As many dispatches in a row as there are experts for: a decode step is not alone either.
    burst = range(EXPERTS // num_chosen)
    some, many = (
        torch.randn(rows, HIDDEN).to(matrices.dtype)
        for rows in (max(1, tokens * TOP_K // EXPERTS), LARGE_ROWS)
    )
    seconds, reading, product, large = _timed(
        lambda: [shard_partial(hidden, next(turns), share, weights) for _ in burst],
        data.sum,
        lambda: [F.linear(some, matrix) for matrix in matrices],
        lambda: [F.linear(many, matrix) for matrix in matrices],
    )
    weight_bytes = (weights.gate_up.nbytes + weights.down.nbytes) * num_chosen / EXPERTS
    num_weights = math.prod(weights.gate_up.shape) + math.prod(weights.down.shape)
    rate = [2 * tokens * TOP_K * num_weights * len(burst) / s for s in seconds]
    read = [weight_bytes * len(burst) / s for s in seconds]
    reads = [READ_BYTES / s for s in reading]
    few, most = (
        [2 * len(x) * matrices.numel() / s for s in all_s]
        for x, all_s in ((some, product), (many, large))
    )
    return {
        "ms": statistics.median(seconds) / len(burst) * 1e3,
        "experts": num_chosen,
        "read_bytes_per_s": statistics.median(reads),
        "of_bandwidth": _ratio(read, reads),
        "product_operations_per_s": statistics.median(few),
        "of_product": _ratio(rate, few),
        "large_product_operations_per_s": statistics.median(most),
        "of_large_product": _ratio(rate, most),
    }


def _cached_rate(matrices: ExpertMatrices) -> float:
    """Bytes a second of one row's product with a matrix that stays in the cache: what computing
    alone, however fast the memory, allows."""
    index = torch.zeros(CACHED_RUNS, dtype=torch.int32)
    begin = range(CACHED_RUNS)
    runs = Runs(experts=[0] * CACHED_RUNS, begin=begin, end=range(1, CACHED_RUNS + 1), index=index)
    x = torch.randn(1, matrices.shape[1]).bfloat16()
    seconds = _median(lambda: grouped_linear(matrices, x, runs))
    return matrices.nbytes / EXPERTS * CACHED_RUNS / seconds


def _line(row: dict[str, object]) -> str:
    return (
        f"{row['bank']:6s} {row['precision']:8s} {row['tokens']:4d} tokens: {row['ms']:8.2f} ms, "
        f"{row['of_bandwidth']:5.0%} of bandwidth, {row['of_product']:5.0%} of plain products "
        f"with as many rows, {row['of_large_product']:4.0%} with many"
    )


def _combine_gain(report: Callable[[str], None]) -> dict[str, float]:
    """A prefill's results added up by the compiled pass and by torch, in milliseconds."""
    tokens = PREFILL[0]
    generator = torch.Generator().manual_seed(tokens)
    results = torch.randn(tokens * TOP_K, HIDDEN, generator=generator).bfloat16()
    weight, values = torch.rand(len(results), generator=generator), torch.zeros(tokens, HIDDEN)
    slot = torch.randint(tokens, (len(results),), generator=generator)
    ways = {"compiled_ms": pairs.combine, "torch_ms": pairs.combine_by_torch}
    found = {
        n: 1e3 * _median(lambda w=w: w(results, weight, slot, values)) for n, w in ways.items()
    }
    report(
        f"results of {tokens} tokens are combined in "
        + ", ".join(f"{ms:.2f} ms ({name.removesuffix('_ms')})" for name, ms in found.items())
    )
    return found


def _encode_rate(report: Callable[[str], None]) -> dict[str, float]:
    """tcq2's weights a second, by all threads."""
    weight = torch.randn(1, 512, HIDDEN)
    seconds = _median(lambda: tcq2.encode(weight))
    report(f"tcq2 encodes {weight.numel() / seconds / 1e6:.0f} million weights a second")
    return {"weights_per_s": weight.numel() / seconds}


def _median(call: Callable[[], object]) -> float:
    """Seconds."""
    return statistics.median(_timed(call)[0])


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _timed(*calls: Callable[[], object]) -> list[list[float]]:
    """Seconds of each in every turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for turn in range(REPEATS + 1):
            for call, taken in zip(calls, seconds, strict=True):
                start = time.perf_counter()
                call()
                if turn:  # the first is not counted
                    taken.append(time.perf_counter() - start)
    return seconds


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _dense(n: int, k: int) -> ExpertMatrices:
    return DenseMatrices(torch.randn(EXPERTS, n, k, dtype=torch.bfloat16))


def _int8(n: int, k: int) -> ExpertMatrices:
    return Int8Matrices(_bytes(EXPERTS, n, k).view(torch.int8), torch.full((EXPERTS, n), 1e-4))


def _int4(n: int, k: int) -> ExpertMatrices:
    scale = torch.full((EXPERTS, n, num_groups(k)), 1e-3, dtype=torch.bfloat16)
    return Int4Matrices(_bytes(EXPERTS, n, k // 2), scale, scale.clone())


def _tcq2(n: int, k: int) -> ExpertMatrices:
    local, row = _bytes(EXPERTS, n, num_groups(k)), torch.full((EXPERTS, n), 1e-6)
    return Tcq2Matrices(_bytes(EXPERTS, n, k // 4), local, row, table.load())


_FORMATS: dict[str, Callable[[int, int], ExpertMatrices]] = {
    "bfloat16": _dense,
    "int8": _int8,
    "int4": _int4,
    "tcq2": _tcq2,
}
