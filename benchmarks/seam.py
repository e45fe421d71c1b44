"""The price of the seam: pools as processes over gRPC against pools inside the decoder.

Same model, same cores, same requests, one after the other in one run. Greedy, a fixed number of
tokens, all requests of a batch in flight together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chiasm.client import AsyncClient, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig

BATCHES = (1, 8, 32)
NEW_TOKENS = 64
PREFILL_TOKENS = 1024
REPEATS = 3
PROMPTS = np.random.default_rng(0)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second: decode by batch size, prefill of one long prompt."""

    decode: dict[int, float]
    prefill: float


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Measures both arrangements of `model`; returns speeds and disaggregated / colocated."""
    config = StackConfig(model=model, text_shards=2, vision_shards=2)
    speeds = {}
    for name, arrangement in {
        "colocated": replace(config, colocate=True),
        "disaggregated": config,
    }.items():
        stack = LocalStack(arrangement)
        try:
            speeds[name] = asyncio.run(_measure(stack.start()))
        finally:
            stack.stop()
        decode = ", ".join(f"{b}: {s:.1f}" for b, s in speeds[name].decode.items())
        report(f"{name}: decode tokens/s by batch {decode}; prefill {speeds[name].prefill:.0f}")
    inside, apart = speeds["colocated"], speeds["disaggregated"]
    ratios = {f"decode, batch {b}": apart.decode[b] / inside.decode[b] for b in BATCHES}
    ratios["prefill"] = apart.prefill / inside.prefill
    for what, ratio in ratios.items():
        report(f"disaggregated / colocated, {what}: {ratio:.2f}")
    return {
        "tokens_per_s": {n: {"decode": s.decode, "prefill": s.prefill} for n, s in speeds.items()},
        "disaggregated_over_colocated": ratios,
    }


async def _measure(endpoint: str) -> Speed:
    async with AsyncClient(endpoint) as client:
        await client.wait_ready()
        await batch_seconds(client, 2, 16, 8)  # warm-up
        decode = {}
        for batch in BATCHES:
            seconds = [await batch_seconds(client, batch, 16, NEW_TOKENS) for _ in range(REPEATS)]
            decode[batch] = batch * NEW_TOKENS / min(seconds)
        seconds = [await batch_seconds(client, 1, PREFILL_TOKENS, 1) for _ in range(REPEATS)]
        return Speed(decode=decode, prefill=PREFILL_TOKENS / min(seconds))


async def batch_seconds(
    client: AsyncClient, size: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Seconds until all answers of a batch are whole. No prompt begins like one before it, or the
    prefix cache would answer for the model."""
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    await asyncio.gather(
        *(
            client.complete(
                Tokens(token_ids=PROMPTS.integers(10, 400, prompt_tokens).tolist()),
                sampling=sampling,
            )
            for _ in range(size)
        )
    )
    return time.perf_counter() - start
