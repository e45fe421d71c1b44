"""Speculation by look-up: off against on, two stacks side by side that take turns.

Questions are held-out ones of the copy and look-up tasks of chiasm.training, as they are judged
(greedy, short answers); then the same prompts are made to go on for long, greedily, where an answer
may repeat itself, and at temperature 1, where guesses are mostly wrong.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import cpu_seconds, exported
from chiasm.client import AsyncClient, Message, Sampling
from chiasm.local import LocalStack, StackConfig
from chiasm.training.data.stream import held_out
from chiasm.training.evaluate import messages

MODES = ("off", "ngram")
QUESTIONS = 8
ROUNDS = 3
CONCURRENCY = (1, 8)
CASES: dict[str, tuple[str, Sampling]] = {
    "copy": ("copy", Sampling(max_tokens=16, temperature=0)),
    "look-up": ("lookup", Sampling(max_tokens=16, temperature=0)),
    "long, greedy": ("copy", Sampling(max_tokens=96, temperature=0, ignore_eos=True)),
    "long, sampled": ("copy", Sampling(max_tokens=96, temperature=1, seed=1, ignore_eos=True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one token: wall time of decoding, processor time of the whole stack, engine steps."""

    wall_s: float
    cpu_s: float
    steps: float


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """What a token costs by case and number of requests at once, on / off."""
    stacks: dict[str, LocalStack] = {}
    try:
        endpoints = {mode: _start(mode, model, stacks) for mode in MODES}
        found: dict[str, object] = {}
        for name, (task, sampling) in CASES.items():
            prompts = [messages(sample) for sample in held_out(task, QUESTIONS)]
            for concurrency in CONCURRENCY:
                before = exported(stacks["ngram"], "decoder")
                costs, num_changed = _compare(stacks, endpoints, prompts, sampling, concurrency)
                after = exported(stacks["ngram"], "decoder")
                guessed, right = (
                    after[f"chiasm_decoder_{kind}_tokens_total"]
                    - before[f"chiasm_decoder_{kind}_tokens_total"]
                    for kind in ("drafted", "accepted")
                )
                ratios = _ratios(costs)
                case = f"{name}, {concurrency} at once"
                found[case] = {
                    "costs": {mode: [asdict(cost) for cost in costs[mode]] for mode in MODES},
                    "on_over_off": ratios,
                    "guessed": guessed,
                    "right": right,
                    "answers_changed": num_changed,
                }
                told = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
                report(
                    f"{case}: on / off {told}; {right:.0f} of {guessed:.0f} guesses right, "
                    f"{num_changed} answers changed"
                )
        return {"per_token": found}
    finally:
        for stack in stacks.values():
            stack.stop()


def _start(mode: str, model: Path, stacks: dict[str, LocalStack]) -> str:
    os.environ["CHIASM_SPECULATION"] = mode
    try:
        # In float32, where no two tokens tie: every difference would be a defect.
        stacks[mode] = LocalStack(StackConfig(model=model, dtype="float32"))
        return stacks[mode].start()
    finally:
        del os.environ["CHIASM_SPECULATION"]


def _compare(
    stacks: dict[str, LocalStack],
    endpoints: dict[str, str],
    prompts: list[list[Message]],
    sampling: Sampling,
    concurrency: int,
) -> tuple[dict[str, list[Cost]], int]:
    """Costs by mode, a round each in turn, after one that is not counted; and how many answers
    differed between the two, which should be none."""
    num_changed = 0
    costs: dict[str, list[Cost]] = {mode: [] for mode in MODES}
    for number in range(ROUNDS + 1):
        answers = {}
        for mode in MODES if number % 2 else MODES[::-1]:
            asked = _round(stacks[mode], endpoints[mode], prompts, sampling, concurrency)
            answers[mode], cost = asyncio.run(asked)
            if number:
                costs[mode].append(cost)
        pairs = zip(answers["off"], answers["ngram"], strict=True)
        num_changed += sum(off != on for off, on in pairs)
    return costs, num_changed


def _ratios(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Median over the rounds of on / off, for each kind of cost."""
    return {
        what: statistics.median(
            getattr(on, what) / getattr(off, what)
            for off, on in zip(costs["off"], costs["ngram"], strict=True)
        )
        for what in ("wall_s", "cpu_s", "steps")
    }


async def _round(
    stack: LocalStack,
    endpoint: str,
    prompts: list[list[Message]],
    sampling: Sampling,
    concurrency: int,
) -> tuple[list[tuple[int, ...]], Cost]:
    places = asyncio.Semaphore(concurrency)
    steps, cpu_s = _steps(stack), cpu_seconds(stack)
    async with AsyncClient(endpoint, timeout_s=600) as client:

        async def one(prompt: list[Message]) -> tuple[tuple[int, ...], int]:
            async with places:
                result = await client.complete(prompt, sampling=sampling)
                return result.token_ids, result.timings.decode_ns

        done = await asyncio.gather(*map(one, prompts))
    cpu_s, steps = cpu_seconds(stack) - cpu_s, _steps(stack) - steps
    num_tokens = sum(len(ids) for ids, _ in done)
    # The first token comes with the prefill.
    num_decoded = max(1, num_tokens - len(done))
    cost = Cost(
        wall_s=sum(ns for _, ns in done) / 1e9 / num_decoded,
        cpu_s=cpu_s / num_tokens,
        steps=steps / num_tokens,
    )
    return [ids for ids, _ in done], cost


def _steps(stack: LocalStack) -> float:
    return exported(stack, "decoder")["chiasm_decoder_step_seconds_count"]
