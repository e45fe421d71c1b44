"""The price of the seam: pools as processes against pools inside the decoder.

Same model in float32, same cores, same requests, in one run: pools inside the decoder, servers
reached through shared memory, servers reached over gRPC streams. The arrangements take turns, so
that a drift of the machine meets all of them. Greedy, a fixed number of tokens, all requests of a
batch in flight together.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
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


Rounds = Mapping[str, Sequence[float]]
"""Tokens a second, round by round: of decoding by batch size, and of one long prompt's prefill."""


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Measures the arrangements of `model`; returns speeds and their share of colocated ones."""
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
    ratios = over_colocated(speeds)
    for name, found in speeds.items():
        listed = ", ".join(f"{what} {statistics.median(s):.0f}" for what, s in found.items())
        report(f"{name}: tokens/s: {listed}")
    for line in lines(ratios):
        report(line)
    return {"dtype": config.dtype, "rounds": speeds, "over_colocated": ratios}


def over_colocated(speeds: Mapping[str, Rounds]) -> dict[str, dict[str, list[float]]]:
    """What share of the speed inside the decoder the others have, round by round: neighbours in
    time, so that a drift of the machine meets both."""
    inside = speeds[INSIDE]
    return {
        name: {
            what: [speed / base for speed, base in zip(found[what], inside[what], strict=True)]
            for what in found
        }
        for name, found in speeds.items()
        if name != INSIDE
    }


def lines(ratios: Mapping[str, Rounds]) -> Iterator[str]:
    """The ratios for a reader: medians, and their range."""
    for name, found in ratios.items():
        listed = ", ".join(
            f"{what} {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"
            for what, r in found.items()
        )
        yield f"{name} / {INSIDE}: {listed}"


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


async def _measure(endpoints: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    speeds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in endpoints}
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
                    speeds[name][f"decode, batch {batch}"].append(batch * NEW_TOKENS / seconds)
            for name, client in clients.items():
                seconds = await batch_seconds(client, 1, PREFILL_TOKENS, 1)
                speeds[name]["prefill"].append(PREFILL_TOKENS / seconds)
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
