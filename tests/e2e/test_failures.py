"""Processes that die, hang and come back, under running requests.

Every answer is compared token by token with that of the same request in peace, and the prefix cache
takes no part in either: a request that asks for its prompt's logits computes them all.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from e2e.cli import chiasm
from e2e.cluster import Cluster, Stream, wait_until
from e2e.disturbed import (
    ENDLESS,
    GREEDY,
    MAX_RUNNING,
    SEEDED,
    TEXT,
    Peace,
    assert_same,
    picture_prompt,
    running_cluster,
    start,
)

from chiasm import errors


def test_text_server_with_a_replica_is_killed(stack: Cluster, peace: Peace) -> None:
    """First the one, then the other, so that one of them was in use."""
    expected = [peace.answer(TEXT, sampling) for sampling in (GREEDY, SEEDED)]
    for _ in range(2):
        victim, *_ = stack.running("text-pool-0")
        stack.add("text-pool-0")
        running = [start(stack, TEXT, sampling) for sampling in (GREEDY, SEEDED)]
        for stream in running:
            stream.wait_tokens(20)
        stack.kill(victim)
        for stream, answer in zip(running, expected, strict=True):
            assert_same(stream.result(), answer)


def test_text_server_with_a_replica_hangs(stack: Cluster, peace: Peace) -> None:
    expected = peace.answer(TEXT)
    stack.add("text-pool-1")
    replicas = stack.running("text-pool-1")
    assert len(replicas) == 2
    for victim in replicas:
        running = start(stack, TEXT)
        running.wait_tokens(20)
        with stack.stopped(victim):
            assert_same(running.result(), expected)
            assert_same(start(stack, TEXT).result(), expected)
            stack.wait_gone(victim)
        stack.wait_ready(victim)
    stack.kill(replicas[0])


def test_last_holder_of_a_text_shard_is_killed(stack: Cluster, peace: Peace) -> None:
    expected = [peace.answer(p) for p in (TEXT, picture_prompt(1))]
    (victim,) = stack.running("text-pool-1")
    running = [start(stack, p) for p in (TEXT, picture_prompt(1))]
    for stream in running:
        stream.wait_tokens(20)
    stack.kill(victim)
    running += [start(stack, p) for p in (TEXT, picture_prompt(1))]
    stack.wait_gone(victim)
    assert not any(stream.is_done for stream in running)
    stack.add("text-pool-1")
    for stream, answer in zip(running, expected * 2, strict=True):
        assert_same(stream.result(), answer)


@pytest.mark.parametrize("hangs", [False, True], ids=["killed", "stopped"])
def test_vision_pool_is_away(stack: Cluster, peace: Peace, hangs: bool) -> None:
    """Text goes on as if nothing had happened, beside more pictures than fit the batch."""
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(2))]
    (victim,) = stack.running("vision-pool-0")
    text = start(stack, TEXT)
    text.wait_tokens(20)
    with contextlib.ExitStack() as until_back:
        if hangs:
            until_back.enter_context(stack.stopped(victim))
        else:
            stack.kill(victim)
        waiting = [start(stack, picture_prompt(2)) for _ in range(MAX_RUNNING + 2)]
        assert_same(text.result(), expected[0])
        assert_same(start(stack, TEXT).result(), expected[0])
        assert not any(stream.is_done for stream in waiting)
    if not hangs:
        stack.add("vision-pool-0")
    for stream in waiting:
        assert_same(stream.result(), expected[1])


def test_encoder_is_away(stack: Cluster, peace: Peace) -> None:
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(3))]
    text = start(stack, TEXT)
    text.wait_tokens(20)
    stack.kill(*stack.running("vision-encoder"))
    waiting = start(stack, picture_prompt(3))
    assert_same(text.result(), expected[0])
    assert not waiting.is_done
    stack.add("vision-encoder")
    assert_same(waiting.result(), expected[1])


def test_encoder_dies_before_its_embeddings_are_fetched(stack: Cluster, peace: Peace) -> None:
    """They are made again, elsewhere."""
    (encoder,) = stack.running("vision-encoder")
    with stack.stopped("decoder"):
        before = stack.encoder_load(encoder).cache_bytes
        running = start(stack, picture_prompt(4))
        wait_until(lambda: stack.encoder_load(encoder).cache_bytes > before, "encoded")
        stack.kill(encoder)
    stack.add("vision-encoder")
    found = running.result()
    assert_same(found, peace.answer(picture_prompt(4)))


def test_decoder_dies_before_the_first_token(stack: Cluster, peace: Peace) -> None:
    expected = [peace.answer(p) for p in (TEXT, picture_prompt(5))]
    stack.add("decoder")
    first, second = stack.running("decoder")
    with stack.stopped(first):
        running = [start(stack, p) for p in (TEXT, picture_prompt(5), TEXT, picture_prompt(5))]
        wait_until(lambda: stack.decoder_load(second).running_requests, "the other one decodes")
        stack.kill(first)
    for stream, answer in zip(running, expected * 2, strict=True):
        assert_same(stream.result(), answer)
    stack.wait_idle(second)


def test_gateway_is_killed(stack: Cluster, peace: Peace) -> None:
    """Streams of clients that do not go on elsewhere break and are dropped by the decoder; another
    gateway takes the same id."""
    sampling = replace(GREEDY, max_tokens=100)
    expected = peace.answer(TEXT, sampling)
    (decoder,) = stack.running("decoder")
    victim = stack.add("gateway")
    ask = partial(
        Stream,
        prompt=TEXT,
        sampling=sampling,
        prompt_logits=True,
        request_id="asked-twice",
        resume_timeout_s=0,
    )
    endless = Stream(stack.address(victim), TEXT, ENDLESS, resume_timeout_s=0)
    endless.wait_tokens(1)
    broken = ask(stack.address(victim))
    broken.wait_tokens(10)
    stack.kill(victim)
    for stream in (broken, endless):
        with pytest.raises(errors.Unavailable) as caught:
            stream.result()
        assert caught.value.reason == "UNAVAILABLE"
    stack.wait_idle(decoder)
    assert_same(ask(stack.endpoint).result(), expected)


def test_orchestrator_is_killed_and_comes_back(stack: Cluster, peace: Peace) -> None:
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(6))]
    stack.add("text-pool-0")
    text, vision = stack.running("text-pool-0")[0], stack.running("vision-pool-0")[0]
    running = start(stack, TEXT)
    running.wait_tokens(20)
    stack.kill("orchestrator")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(chiasm, "status", "--endpoint", stack.orchestrator)
        assert_same(running.result(), expected[0])
        assert_same(start(stack, picture_prompt(6)).result(), expected[1])
        status = asked.result()
    assert (status.returncode, status.stdout, status.stderr.count("\n")) == (1, "", 1)

    # Deaths that nobody announces.
    running = start(stack, TEXT)
    running.wait_tokens(20)
    stack.kill(text)
    assert_same(running.result(), expected[0])
    running = start(stack, TEXT)
    running.wait_tokens(20)
    stack.kill(vision)
    waiting = start(stack, picture_prompt(6))
    assert_same(running.result(), expected[0])
    assert_same(start(stack, TEXT).result(), expected[0])
    assert not waiting.is_done

    running = start(stack, TEXT)
    stack.restart_orchestrator()
    stack.add("vision-pool-0")
    stack.wait_complete()
    assert_same(waiting.result(), expected[1])
    assert_same(running.result(), expected[0])
    status = chiasm("status", "--endpoint", stack.orchestrator, "--json")
    assert (status.returncode, status.stderr) == (0, "")
    assert json.loads(status.stdout)["complete"]


def test_what_does_not_come_back_is_unavailable(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """One part after the other dies for good; every refusal says when to come back."""
    with running_cluster(tiny_checkpoint, tmp_path, park_timeout_s=1.0, text_servers=1) as stack:
        text = start(stack, TEXT, ENDLESS)
        text.wait_tokens(1)
        stack.kill("vision-pool-0")
        assert_unavailable(start(stack, picture_prompt(1)), "EXPERT_POOL_UNAVAILABLE")
        stack.kill("vision-encoder")
        assert_unavailable(start(stack, picture_prompt(1)), "ENCODER_UNAVAILABLE")
        assert not text.is_done
        stack.kill("text-pool-0")
        assert_unavailable(text)
        assert_unavailable(start(stack, TEXT))
        stack.wait_idle("decoder")
        stack.add("text-pool-0")
        stack.wait_ready("decoder")
        text = start(stack, TEXT, ENDLESS)
        text.wait_tokens(1)
        stack.kill("decoder")
        assert_unavailable(text)
        assert_unavailable(start(stack, TEXT), "DECODER_UNAVAILABLE")


def assert_unavailable(stream: Stream, reason: str = "") -> None:
    with pytest.raises(errors.Unavailable) as caught:
        stream.result()
    assert caught.value.retry_after_s is not None
    assert reason in ("", caught.value.reason)
