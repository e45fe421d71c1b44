"""The published geometry, whole, on one small machine: 28 layers, experts in two bits.

    python -m benchmarks.whole_geometry --work DIR

`chiasm synth` writes random weights straight in low precision, the decoder's matrices once in
bfloat16 and once in int8 (about 22 GB on disk); the stack of separate processes serves them.
Measured through the gateway: tokens a second of decoding by batch size and of a long prompt,
seconds to the first token of a question about a picture, what a decode step of one request spends
its time on, and what every process holds in memory; with half the cores a process, and with all of
them, as `chiasm up` has it.
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
from benchmarks.processes import cpu_seconds, exported, memory
from chiasm import cores
from chiasm.bench import content
from chiasm.bench.workload import Picture
from chiasm.client import AsyncClient, Delta, Sampling, Tokens, image, user
from chiasm.local import LocalStack, StackConfig
from chiasm.model.synth import synthesize

PRESET, EXPERTS = "ernie-4.5-vl-28b-a3b", "tcq2"
DENSE = ("stored", "int8")
BATCHES = (1, 8)
NEW_TOKENS, PREFILL_TOKENS, SIDE = 24, 512, 448
ROUNDS = 3
KV_CACHE_TOKENS = 16_384
"""About 0.9 GB; the default, four times the context, is for machines with the memory."""
START_S = 1800.0


def main() -> None:
    """Makes the checkpoints where missing, measures, writes results/whole_geometry.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints")
    options = parser.parse_args()
    os.environ["CHIASM_KV_CACHE_TOKENS"] = str(KV_CACHE_TOKENS)
    with documents.measuring("whole_geometry") as document, contextlib.ExitStack() as running:
        work = options.work or Path(running.enter_context(tempfile.TemporaryDirectory()))
        document["result"] = {
            "preset": PRESET,
            "experts": EXPERTS,
            "by_dense": {dense: _measured(work / dense, dense) for dense in DENSE},
        }


def _measured(model: Path, dense: str) -> dict[str, Any]:
    """The numbers of one checkpoint."""
    if not model.exists():
        synthesize(model, preset=PRESET, experts=EXPERTS, dense=dense)
    num_cores = cores.usable()
    sys.stdout.write(f"== decoder's matrices: {dense}\n")
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in model.iterdir()),
        "by_threads": {
            threads: _serve(model, threads) for threads in sorted({num_cores // 2 or 1, num_cores})
        },
    }


def _serve(model: Path, threads: int) -> dict[str, Any]:
    """A stack's numbers, its processes having so many threads each; prints them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    stack = LocalStack(
        StackConfig(model=model, text_shards=1, vision_shards=1, startup_timeout_s=START_S)
    )
    start = time.perf_counter()
    try:
        endpoint = stack.start()
        found: dict[str, Any] = {"start_s": time.perf_counter() - start}
        found["memory_after_start"] = memory(stack)
        found |= asyncio.run(_measure(endpoint))
        found["step"] = asyncio.run(_step(endpoint, stack))
        found["memory_at_the_end"] = memory(stack)
    finally:
        stack.stop()
    sys.stdout.write(f"== OMP_NUM_THREADS={threads}\n{_summary(found)}")
    return found


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


async def _step(endpoint: str, stack: LocalStack) -> dict[str, float]:
    """A decode step of one request, the prompt's not counted: milliseconds of it, that the decoder
    waits for the text pool, that the pool computes; and of processor time by process."""
    prompt = Tokens(token_ids=seam.PROMPTS.integers(10, 400, 16).tolist())
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    before: dict[str, float] = {}
    async with AsyncClient(endpoint, timeout_s=START_S) as client:
        async for event in client.generate(prompt, sampling=sampling):
            if isinstance(event, Delta) and not before:
                before = _spent(stack)
    spent = {name: after - before[name] for name, after in _spent(stack).items()}
    steps = spent.pop("steps")
    return {name: 1e3 * seconds / steps for name, seconds in spent.items()}


def _spent(stack: LocalStack) -> dict[str, float]:
    """Steps since the start, and seconds."""
    decoder, pool = exported(stack, "decoder"), exported(stack, "text-pool-0")
    return {
        "steps": decoder["chiasm_decoder_step_seconds_count"],
        "all": decoder["chiasm_decoder_step_seconds_sum"],
        "waiting": decoder['chiasm_decoder_expert_wait_seconds_sum{modality="text"}'],
        "pool": pool['chiasm_dispatch_compute_seconds_sum{modality="text"}'],
        "decoder's processor": cpu_seconds(stack, ["decoder"]),
        "pool's processor": cpu_seconds(stack, ["text-pool-0"]),
    }


async def _picture_seconds(client: AsyncClient, seed: int) -> float:
    """Until the first token about a picture of SIDE x SIDE that nobody has asked about before."""
    file = content.jpeg(Picture(seed=(seed,), width=SIDE, height=SIDE))
    question = user(image(file), "What is it?")
    start = time.perf_counter()
    await client.complete([question], sampling=Sampling(max_tokens=1, temperature=0))
    return time.perf_counter() - start


def _summary(found: dict[str, Any]) -> str:
    lines = [f"ready after {found['start_s']:.0f} s"]
    lines += [
        f"decode, batch {batch}: {max(speeds):.2f} tokens/s"
        for batch, speeds in found["decode_tokens_per_s"].items()
    ]
    lines.append(f"prefill of {PREFILL_TOKENS}: {max(found['prefill_tokens_per_s']):.1f} tokens/s")
    lines.append(f"picture, first token: {min(found['picture_first_token_s']):.1f} s")
    step = ", ".join(f"{name} {ms:.0f}" for name, ms in found["step"].items())
    lines.append(f"ms of a decode step: {step}")
    lines.append("GB of its own, after the start and at the end:")
    before, after = (
        {name: held["own"] / 1e9 for name, held in found[moment].items()}
        for moment in ("memory_after_start", "memory_at_the_end")
    )
    lines += [f"  {name}: {before[name]:.2f}, {after[name]:.2f}" for name in before]
    lines.append(f"  all: {sum(before.values()):.2f}, {sum(after.values()):.2f}")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
