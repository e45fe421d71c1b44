"""Ping-pong micro-batches: off against on against automatic, on the same stack geometry.

The arrangements take turns (A B C A B C), so that a drift of the machine meets all of them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.seam import NEW_TOKENS, batch_seconds
from chiasm.client import AsyncClient
from chiasm.local import LocalStack, StackConfig

MODES = ("off", "on", "auto")
BATCHES = (8, 32)
ROUNDS = 3


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Decode tokens a second by mode and batch; returns medians and ratios to `off`."""
    speeds: dict[str, dict[int, list[float]]] = {m: {b: [] for b in BATCHES} for m in MODES}
    for _ in range(ROUNDS):
        for mode in MODES:
            os.environ["CHIASM_MICRO_BATCHES"] = mode
            stack = LocalStack(StackConfig(model=model, text_shards=2, vision_shards=2))
            try:
                for batch, speed in asyncio.run(_measure(stack.start())).items():
                    speeds[mode][batch].append(speed)
            finally:
                stack.stop()
                del os.environ["CHIASM_MICRO_BATCHES"]
    medians = {m: {b: statistics.median(s) for b, s in by.items()} for m, by in speeds.items()}
    for mode, by_batch in medians.items():
        for batch, speed in by_batch.items():
            ratio = speed / medians["off"][batch]
            report(f"{mode:4s} batch {batch:2d}: {speed:7.1f} tokens/s, {ratio:.2f} of off")
    return {"decode_tokens_per_s": speeds, "median": medians}


async def _measure(endpoint: str) -> dict[int, float]:
    async with AsyncClient(endpoint) as client:
        await client.wait_ready()
        await batch_seconds(client, 8, 16, 32)  # warm-up, and time for `auto` to learn
        return {b: b * NEW_TOKENS / await batch_seconds(client, b, 16, NEW_TOKENS) for b in BATCHES}
