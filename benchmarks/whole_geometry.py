"""The published geometry, whole, on one small machine: 28 layers, experts in two bits.

    python -m benchmarks.whole_geometry --work DIR

`chiasm synth` writes random weights straight in low precision (about 12 GB on disk); the stack of
separate processes serves them. Measured through the gateway: tokens a second of decoding by batch
size and of a long prompt, seconds to the first token of a question about a picture, and what every
process holds in memory. A request alone is in one process at a time, so each process may take all
cores, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import documents, seam
from benchmarks.processes import memory
from chiasm.bench import content
from chiasm.bench.workload import Picture
from chiasm.client import AsyncClient, Sampling, image, user
from chiasm.local import LocalStack, StackConfig
from chiasm.model.synth import synthesize

PRESET, PRECISION = "ernie-4.5-vl-28b-a3b", "tcq2"
BATCHES = (1, 8)
NEW_TOKENS, PREFILL_TOKENS, SIDE = 24, 512, 448
ROUNDS = 3
KV_CACHE_TOKENS = 16_384
"""About 0.9 GB; the default, four times the context, is for machines with the memory."""
START_S = 1800.0


def main() -> None:
    """Makes the checkpoint where it is missing, measures, writes results/whole_geometry.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint")
    options = parser.parse_args()
    os.environ["CHIASM_KV_CACHE_TOKENS"] = str(KV_CACHE_TOKENS)
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with documents.measuring("whole_geometry") as document, contextlib.ExitStack() as running:
        work = options.work or Path(running.enter_context(tempfile.TemporaryDirectory()))
        model, found = work / "model", dict[str, Any](preset=PRESET, experts=PRECISION)
        if not model.exists():
            start = time.perf_counter()
            synthesize(model, preset=PRESET, experts=PRECISION)
            found["synth_s"] = time.perf_counter() - start
        found["threads"] = int(threads)
        found["checkpoint_bytes"] = sum(file.stat().st_size for file in model.iterdir())
        start = time.perf_counter()
        stack = LocalStack(
            StackConfig(model=model, text_shards=1, vision_shards=1, startup_timeout_s=START_S)
        )
        running.callback(stack.stop)
        endpoint = stack.start()
        found["start_s"] = time.perf_counter() - start
        found["memory_after_start"] = memory(stack)
        found.update(asyncio.run(_measure(endpoint)))
        found["memory_at_the_end"] = memory(stack)
        document["result"] = found
        sys.stdout.write(_summary(found))


async def _measure(endpoint: str) -> dict[str, Any]:
    """Rounds of every speed, round by round."""
    decode: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    prefill, picture = [], []
    async with AsyncClient(endpoint, timeout_s=START_S) as client:
        await seam.batch_seconds(client, 1, 16, 4)  # warm-up
        for seed in range(ROUNDS):
            for batch in BATCHES:
                seconds = await seam.batch_seconds(client, batch, 16, NEW_TOKENS)
                decode[batch].append(batch * NEW_TOKENS / seconds)
            seconds = await seam.batch_seconds(client, 1, PREFILL_TOKENS, 1)
            prefill.append(PREFILL_TOKENS / seconds)
            picture.append(await _picture_seconds(client, seed))
    return {
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": prefill,
        "picture_first_token_s": picture,
    }


async def _picture_seconds(client: AsyncClient, seed: int) -> float:
    """Until the first token about a picture of SIDE x SIDE that nobody has asked about before."""
    file = content.jpeg(Picture(seed=(seed,), width=SIDE, height=SIDE))
    question = user(image(file), "What is it?")
    start = time.perf_counter()
    await client.complete([question], sampling=Sampling(max_tokens=1, temperature=0))
    return time.perf_counter() - start


def _summary(found: dict[str, Any]) -> str:
    lines = [
        f"decode, batch {batch}: {max(speeds):.2f} tokens/s"
        for batch, speeds in found["decode_tokens_per_s"].items()
    ]
    lines.append(f"prefill of {PREFILL_TOKENS}: {max(found['prefill_tokens_per_s']):.1f} tokens/s")
    lines.append(f"picture, first token: {min(found['picture_first_token_s']):.1f} s")
    lines += [
        f"{name}: {held['own'] / 1e9:.2f} GB of its own, {held['resident'] / 1e9:.2f} GB resident"
        for name, held in found["memory_at_the_end"].items()
    ]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
