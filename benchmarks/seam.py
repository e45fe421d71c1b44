"""The price of the seam: pools as processes against pools inside the decoder.

Same model in float32, same cores, same requests, in one run: pools inside the decoder, servers
reached through shared memory, servers reached over gRPC streams. The arrangements take turns, so
that a drift of the machine meets all of them. Greedy, a fixed number of tokens, all requests of a
batch in flight together.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from chiasm.client import AsyncClient, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig

BATCHES = (1, 8, 32)
NEW_TOKENS = 64
PREFILL_TOKENS = 1024
ROUNDS = 5
PROMPTS = np.random.default_rng(0)
INSIDE, LANE, STREAM = "colocated", "shared memory", "gRPC stream"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second, round by round: decode by batch size, and prefill of one long prompt."""

    decode: dict[int, list[float]] = field(default_factory=lambda: {b: [] for b in BATCHES})
    prefill: list[float] = field(default_factory=list)

    def best(self) -> dict[str, float]:
        """Of all rounds: what the machine's other work disturbs least."""
        found = {f"decode, batch {batch}": max(speeds) for batch, speeds in self.decode.items()}
        return {**found, "prefill": max(self.prefill)}


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Measures the arrangements of `model`; returns speeds and what share of colocated they are."""
    config = StackConfig(model=model, text_shards=2, vision_shards=2, dtype="float32")
    arrangements = {
        INSIDE: (replace(config, colocate=True), True),
        LANE: (config, True),
        STREAM: (config, False),
    }
    with ExitStack() as running:
        endpoints = {
            name: running.enter_context(_started(*arrangement))
            for name, arrangement in arrangements.items()
        }
        speeds = asyncio.run(_measure(endpoints))
    best = {name: speed.best() for name, speed in speeds.items()}
    ratios = {
        name: {what: speed / best[INSIDE][what] for what, speed in found.items()}
        for name, found in best.items()
        if name != INSIDE
    }
    for name, found in best.items():
        listed = ", ".join(f"{what} {speed:.0f}" for what, speed in found.items())
        report(f"{name}: tokens/s: {listed}")
    for name, found in ratios.items():
        listed = ", ".join(f"{what} {ratio:.2f}" for what, ratio in found.items())
        report(f"{name} / {INSIDE}: {listed}")
    return {
        "dtype": config.dtype,
        "rounds": {n: {"decode": s.decode, "prefill": s.prefill} for n, s in speeds.items()},
        "best_tokens_per_s": best,
        "over_colocated": ratios,
    }


@contextmanager
def _started(config: StackConfig, lane: bool) -> Iterator[str]:
    """A stack's endpoint; `lane`: whether its decoder may use shared memory."""
    os.environ["CHIASM_LANE"] = str(lane).lower()
    stack = LocalStack(config)
    try:
        yield stack.start()
    finally:
        os.environ.pop("CHIASM_LANE", None)
        stack.stop()


async def _measure(endpoints: dict[str, str]) -> dict[str, Speed]:
    speeds = {name: Speed() for name in endpoints}
    async with AsyncExitStack() as open_clients:
        clients = {
            name: await open_clients.enter_async_context(AsyncClient(endpoint))
            for name, endpoint in endpoints.items()
        }
        for client in clients.values():
            await client.wait_ready()
            await batch_seconds(client, 2, 16, 16)  # warm-up
        for _ in range(ROUNDS):
            for batch in BATCHES:
                for name, client in clients.items():
                    seconds = await batch_seconds(client, batch, 16, NEW_TOKENS)
                    speeds[name].decode[batch].append(batch * NEW_TOKENS / seconds)
            for name, client in clients.items():
                seconds = await batch_seconds(client, 1, PREFILL_TOKENS, 1)
                speeds[name].prefill.append(PREFILL_TOKENS / seconds)
    return speeds


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
