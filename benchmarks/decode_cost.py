"""Decoding after long prompts, through the whole system: what a token costs, and what it reads.

A synthetic model of the tiny kind with a longer context is made for the run. Per token the keys and
values of the whole history are read; all else is the same at every length. So the cost above that
of the shortest history, over the bytes above its bytes, should be one number.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.processes import cpu_seconds
from chiasm.client import Client, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig
from chiasm.model.config import ModelConfig
from chiasm.model.synth import PRESETS, synthesize

LENGTHS = (1024, 8192, 32768)
NEW_TOKENS = 65
ROUNDS = 5
CONTEXT = 40_960
ELEMENT_BYTES = 2
"""Of bfloat16, the default of a stack."""

KINDS = {"wall": "of decoding", "cpu": "of the decoder's process"}


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Milliseconds per token by length of the history, with the bytes of keys and values read."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "long"
        synthesize(model, preset=replace(PRESETS["tiny"], max_position_embeddings=CONTEXT))
        text = ModelConfig.load(model).text
        bytes_per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * ELEMENT_BYTES
        seconds = _measure(model)
    found: dict[str, object] = {"seconds_per_token": seconds}
    for kind, whose in KINDS.items():
        rows = [
            {
                "tokens": length,
                "read_bytes": length * bytes_per_token,
                "ms": statistics.median(seconds[kind][length]) * 1e3,
            }
            for length in LENGTHS
        ]
        first = rows[0]
        for row in rows[1:]:
            extra_bytes = row["read_bytes"] - first["read_bytes"]
            row["ns_per_extra_byte"] = (row["ms"] - first["ms"]) * 1e6 / extra_bytes
        found[kind] = rows
        for row in rows:
            per_byte = row.get("ns_per_extra_byte")
            report(
                f"{row['tokens']:6.0f} tokens, {row['read_bytes'] / 1e6:5.1f} MB read: "
                f"{row['ms']:.2f} ms {whose}"
                + ("" if per_byte is None else f", {per_byte:.2f} ns a byte above the first")
            )
    return found


def _measure(model: Path) -> dict[str, dict[int, list[float]]]:
    """Seconds per token by kind and length. Lengths take turns; a prompt is prefilled once, then
    the prefix cache knows it."""
    generator = np.random.default_rng(0)
    prompts = {n: Tokens(token_ids=generator.integers(10, 400, n).tolist()) for n in LENGTHS}
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    found: dict[str, dict[int, list[float]]] = {k: {n: [] for n in LENGTHS} for k in KINDS}
    os.environ["CHIASM_MAX_STEP_TOKENS"] = "2048"
    stack = LocalStack(StackConfig(model=model))
    try:
        with Client(stack.start(), timeout_s=600) as client:
            for number in range(ROUNDS + 1):
                for length, prompt in prompts.items():
                    before = cpu_seconds(stack, ["decoder"])
                    timings = client.complete(prompt, sampling=sampling).timings
                    cpu_s = cpu_seconds(stack, ["decoder"]) - before
                    if number:
                        wall_s = timings.decode_ns / 1e9
                        found["wall"][length].append(wall_s / (NEW_TOKENS - 1))
                        found["cpu"][length].append(cpu_s / NEW_TOKENS)
    finally:
        stack.stop()
        del os.environ["CHIASM_MAX_STEP_TOKENS"]
    return found
