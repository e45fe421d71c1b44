"""Processes that die, hang, end and come back, under running requests.

Every answer is compared token by token with that of the same request in peace, and the prefix cache
takes no part in either: a request that asks for its prompt's logits computes them all.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster, wait_until

from chiasm import errors
from chiasm.client import Client, Prompt, Result, Sampling, image, user
from chiasm.local import StackConfig
from chiasm.membership import Role

LEASE_MS = 1500
GREEDY = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
SEEDED = Sampling(max_tokens=200, temperature=0.8, seed=7, ignore_eos=True)
ENDLESS = Sampling(max_tokens=3000, temperature=0, ignore_eos=True)

TEXT: Prompt = [user("Tell me of the sea, the wind and the rain.")]
LOGITS_TOLERANCE = 1e-4


@cache
def picture_prompt(seed: int) -> Prompt:
    return [user(image(png(picture(84, 112, seed))), "What is in the picture?")]


class Peace:
    """Answers of the undisturbed stack, each asked for once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[tuple[int, int], Result] = {}
        self._prompts: list[object] = []

    def answer(self, prompt: Prompt, sampling: Sampling = GREEDY) -> Result:
        key = id(prompt), id(sampling)
        if key not in self._known:
            self._prompts.append((prompt, sampling))  # keeps the ids taken
            self._known[key] = self._client.complete(prompt, sampling=sampling, prompt_logits=True)
        return self._known[key]


Parts = tuple[Cluster, Client, Peace]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: object) -> Iterator[Parts]:
    config = StackConfig(
        model=tiny_checkpoint,  # type: ignore[arg-type]
        dtype="float32",
        text_servers=2,
        grace_s=60,
        log_dir=tmp_path_factory.mktemp("logs"),
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHIASM_LEASE_MS", str(LEASE_MS))
        environment.setenv("CHIASM_PARK_TIMEOUT_S", "60")
        with cluster(config) as (stack, client):
            yield stack, client, Peace(client)


def start(client: Client, prompt: Prompt, sampling: Sampling = GREEDY) -> Stream:
    return Stream(client, prompt, sampling, prompt_logits=True)


def assert_same(found: Result, expected: Result) -> None:
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.prompt_logits is not None
    assert expected.prompt_logits is not None
    assert np.abs(found.prompt_logits - expected.prompt_logits).max() <= LOGITS_TOLERANCE


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_text_server_with_a_replica_is_killed(parts: Parts, sampling: Sampling) -> None:
    """First the one, then the other, so that one of them was in use."""
    stack, client, peace = parts
    expected = peace.answer(TEXT, sampling)
    first = next(name for name in stack.children if name.startswith("text-pool-0"))
    replicas = [name for name in stack.names(Role.EXPERT_POOL) if name.startswith("text-pool-0")]
    for victim in replicas:
        stack.add(first)
        running = start(client, TEXT, sampling)
        running.wait_tokens(20)
        stack.kill(victim)
        assert_same(running.result(), expected)


def test_text_server_with_a_replica_hangs(parts: Parts) -> None:
    stack, client, peace = parts
    expected = peace.answer(TEXT)
    stack.add("text-pool-1")
    replicas = [name for name in stack.names(Role.EXPERT_POOL) if name.startswith("text-pool-1")]
    assert len(replicas) == 2
    for victim in replicas:
        running = start(client, TEXT)
        running.wait_tokens(20)
        with stack.stopped(victim):
            assert_same(running.result(), expected)
            assert_same(start(client, TEXT).result(), expected)
            stack.wait_gone(victim)
        stack.wait_ready(victim)
    stack.kill(replicas[0])


def test_last_holder_of_a_text_shard_is_killed(parts: Parts) -> None:
    stack, client, peace = parts
    expected = [peace.answer(p) for p in (TEXT, picture_prompt(1))]
    (victim,) = [n for n in stack.names(Role.EXPERT_POOL) if n.startswith("text-pool-1")]
    running = [start(client, p) for p in (TEXT, picture_prompt(1))]
    for stream in running:
        stream.wait_tokens(20)
    stack.kill(victim)
    running += [start(client, p) for p in (TEXT, picture_prompt(1))]
    stack.wait_gone(victim)
    assert not any(stream.is_done for stream in running)
    stack.add("text-pool-1")
    for stream, answer in zip(running, expected * 2, strict=True):
        assert_same(stream.result(), answer)


@pytest.mark.parametrize("hangs", [False, True], ids=["killed", "stopped"])
def test_vision_pool_is_away(parts: Parts, hangs: bool) -> None:
    """Text goes on as if nothing had happened, beside a picture that waits for its pool."""
    stack, client, peace = parts
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(2))]
    (victim,) = [n for n in stack.names(Role.EXPERT_POOL) if n.startswith("vision-pool-0")]
    text = start(client, TEXT)
    text.wait_tokens(20)
    if hangs:
        with stack.stopped(victim):
            waiting = start(client, picture_prompt(2))
            assert_same(text.result(), expected[0])
            assert_same(start(client, TEXT).result(), expected[0])
            assert not waiting.is_done
    else:
        stack.kill(victim)
        waiting = start(client, picture_prompt(2))
        assert_same(text.result(), expected[0])
        assert_same(start(client, TEXT).result(), expected[0])
        assert not waiting.is_done
        stack.add("vision-pool-0")
    assert_same(waiting.result(), expected[1])


def test_encoder_is_away(parts: Parts) -> None:
    stack, client, peace = parts
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(3))]
    text = start(client, TEXT)
    text.wait_tokens(20)
    stack.kill("vision-encoder")
    waiting = start(client, picture_prompt(3))
    assert_same(text.result(), expected[0])
    assert not waiting.is_done
    stack.add("vision-encoder")
    assert_same(waiting.result(), expected[1])


def test_encoder_dies_before_its_embeddings_are_fetched(parts: Parts) -> None:
    """They are made again, elsewhere."""
    stack, client, peace = parts
    encoder = stack.names(Role.VISION_ENCODER)[0]
    with stack.stopped("decoder"):
        before = stack.encoder_load(encoder).cache_bytes
        running = start(client, picture_prompt(4))
        wait_until(lambda: stack.encoder_load(encoder).cache_bytes > before, "encoded")
        stack.kill(encoder)
    stack.add("vision-encoder")
    found = running.result()
    assert_same(found, peace.answer(picture_prompt(4)))


def test_decoder_dies_before_the_first_token(parts: Parts) -> None:
    stack, client, peace = parts
    expected = [peace.answer(p) for p in (TEXT, picture_prompt(5))]
    stack.add("decoder")
    first, second = stack.names(Role.DECODER)
    with stack.stopped(first):
        running = [start(client, p) for p in (TEXT, picture_prompt(5), TEXT, picture_prompt(5))]
        wait_until(lambda: stack.decoder_load(second).running_requests, "the other one decodes")
        stack.kill(first)
    for stream, answer in zip(running, expected * 2, strict=True):
        assert_same(stream.result(), answer)
    stack.wait_idle(second)


def test_orchestrator_is_killed_and_comes_back(parts: Parts) -> None:
    stack, client, peace = parts
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(6))]
    stack.add("text-pool-0")
    replicas = [n for n in stack.names(Role.EXPERT_POOL) if n.startswith("text-pool-0")]
    (vision,) = [n for n in stack.names(Role.EXPERT_POOL) if n.startswith("vision-pool-0")]
    running = start(client, TEXT)
    running.wait_tokens(20)
    stack.kill("orchestrator")
    status = chiasm("status", "--endpoint", stack.orchestrator)
    assert (status.returncode, status.stdout, status.stderr.count("\n")) == (1, "", 1)
    assert_same(running.result(), expected[0])
    assert_same(start(client, picture_prompt(6)).result(), expected[1])

    # A death that nobody announces.
    running = start(client, TEXT)
    running.wait_tokens(20)
    stack.kill(replicas[0])
    assert_same(running.result(), expected[0])
    running = start(client, TEXT)
    running.wait_tokens(20)
    stack.kill(vision)
    waiting = start(client, picture_prompt(6))
    assert_same(running.result(), expected[0])
    assert_same(start(client, TEXT).result(), expected[0])
    assert not waiting.is_done

    running = start(client, TEXT)
    stack.restart_orchestrator()
    stack.add("vision-pool-0")
    stack.wait_complete()
    assert_same(waiting.result(), expected[1])
    assert_same(running.result(), expected[0])
    status = chiasm("status", "--endpoint", stack.orchestrator, "--json")
    assert (status.returncode, status.stderr) == (0, "")
    assert '"complete": true' in status.stdout


def chiasm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chiasm", *arguments], capture_output=True, text=True, timeout=60
    )


def test_client_goes_away(parts: Parts) -> None:
    stack, client, _ = parts
    (decoder,) = stack.names(Role.DECODER)
    events = client.generate(TEXT, sampling=ENDLESS)
    for _ in range(20):
        next(events)
    assert stack.decoder_load(decoder).running_requests == 1
    events.close()  # type: ignore[attr-defined]
    stack.wait_idle(decoder)
