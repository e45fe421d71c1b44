"""Expert servers of every precision die and hang; not a bit of an answer shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint.banks import wide
from e2e.cluster import Cluster, cluster
from e2e.disturbed import GREEDY, TEXT, Peace, assert_equal, picture_prompt, start

from chiasm.client import Prompt
from chiasm.local import StackConfig
from chiasm.model.synth import synthesize

LONG = replace(GREEDY, max_tokens=120, logprobs=2)
PICTURE = picture_prompt(1)


@pytest.mark.parametrize("precision", ["stored", "int8", "int4", "tcq2"])
def test_a_replica_gives_the_same_bits(tmp_path: Path, precision: str) -> None:
    synthesize(tmp_path / "model", preset=wide(), experts=precision, seed=3)
    logs = tmp_path / "logs"
    config = StackConfig(model=tmp_path / "model", dtype="bfloat16", grace_s=60, log_dir=logs)
    with cluster(config) as stack:
        peace = Peace(stack.endpoint, LONG)
        for prompt in (TEXT, PICTURE):
            peace.answer(prompt)
        assert_same_when_killed(stack, peace, TEXT, "text-pool-0")
        assert_same_when_killed(stack, peace, PICTURE, "text-pool-0")
        assert_same_when_killed(stack, peace, PICTURE, "vision-pool-0")
        stack.add("text-pool-0")
        running = start(stack, TEXT, LONG)
        running.wait_tokens(10)
        with stack.stopped(stack.in_use("text-pool-0")):
            assert_equal(running.result(), peace.answer(TEXT))


def assert_same_when_killed(stack: Cluster, peace: Peace, prompt: Prompt, pool: str) -> None:
    """Either of two servers: text experts in the midst of the answer, vision experts, which answers
    do not need, as soon as it is asked for."""
    stack.add(pool)
    running = start(stack, prompt, LONG)
    if pool == "text-pool-0":
        running.wait_tokens(10)
    stack.kill(stack.running(pool)[0])
    assert_equal(running.result(), peace.answer(prompt))
