"""Processes that die, hang, end and come back, under running requests.

Every answer is compared token by token with that of the same request in peace, and the prefix cache
takes no part in either: a request that asks for its prompt's logits computes them all.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster, wait_until
from PIL import Image

from chiasm import errors
from chiasm.client import Client, Prompt, Result, Sampling, image, user
from chiasm.local import StackConfig
from chiasm.membership import MemberState

LEASE_MS = 1500
GREEDY = Sampling(max_tokens=100, temperature=0, ignore_eos=True)
SEEDED = Sampling(max_tokens=100, temperature=0.8, seed=7, ignore_eos=True)
ENDLESS = Sampling(max_tokens=3000, temperature=0, ignore_eos=True)

TEXT: Prompt = [user("Tell me of the sea, the wind and the rain.")]
LOGITS_TOLERANCE = 1e-4

MAX_GROWTH_BYTES = 24 << 20
"""What a decoder's memory may grow by over 60 requests like 60 before them."""


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


@contextmanager
def running_cluster(
    model: Path, log_dir: Path, *, park_timeout_s: float, text_servers: int
) -> Iterator[Cluster]:
    config = StackConfig(
        model=model, dtype="float32", text_servers=text_servers, grace_s=60, log_dir=log_dir
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHIASM_LEASE_MS", str(LEASE_MS))
        environment.setenv("CHIASM_PARK_TIMEOUT_S", str(park_timeout_s))
        with cluster(config) as running:
            yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("logs")
    with running_cluster(tiny_checkpoint, logs, park_timeout_s=60, text_servers=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: Cluster) -> Iterator[Client]:
    with Client(stack.endpoint, timeout_s=60) as running:
        yield running


@pytest.fixture(scope="module")
def peace(client: Client) -> Peace:
    return Peace(client)


def start(
    stack: Cluster, prompt: Prompt, sampling: Sampling = GREEDY, *, endpoint: str = ""
) -> Stream:
    return Stream(endpoint or stack.endpoint, prompt, sampling, prompt_logits=True)


def assert_same(found: Result, expected: Result) -> None:
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.prompt_logits is not None
    assert expected.prompt_logits is not None
    assert np.abs(found.prompt_logits - expected.prompt_logits).max() <= LOGITS_TOLERANCE


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
    """Text goes on as if nothing had happened, beside a picture that waits for its pool."""
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(2))]
    (victim,) = stack.running("vision-pool-0")
    text = start(stack, TEXT)
    text.wait_tokens(20)
    if hangs:
        with stack.stopped(victim):
            waiting = start(stack, picture_prompt(2))
            assert_same(text.result(), expected[0])
            assert_same(start(stack, TEXT).result(), expected[0])
            assert not waiting.is_done
    else:
        stack.kill(victim)
        waiting = start(stack, picture_prompt(2))
        assert_same(text.result(), expected[0])
        assert_same(start(stack, TEXT).result(), expected[0])
        assert not waiting.is_done
        stack.add("vision-pool-0")
    assert_same(waiting.result(), expected[1])


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


def test_orchestrator_is_killed_and_comes_back(stack: Cluster, peace: Peace) -> None:
    expected = [peace.answer(TEXT), peace.answer(picture_prompt(6))]
    stack.add("text-pool-0")
    text, vision = stack.running("text-pool-0")[0], stack.running("vision-pool-0")[0]
    running = start(stack, TEXT)
    running.wait_tokens(20)
    stack.kill("orchestrator")
    status = chiasm("status", "--endpoint", stack.orchestrator)
    assert (status.returncode, status.stdout, status.stderr.count("\n")) == (1, "", 1)
    assert_same(running.result(), expected[0])
    assert_same(start(stack, picture_prompt(6)).result(), expected[1])

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


def test_client_cancels_or_dies(stack: Cluster, client: Client) -> None:
    (decoder,) = stack.running("decoder")
    events = client.generate(TEXT, sampling=ENDLESS)
    for _ in range(20):
        next(events)
    load = stack.decoder_load(decoder)
    assert load.running_requests == 1
    assert load.kv_tokens_used > 0
    events.close()  # type: ignore[attr-defined]
    stack.wait_idle(decoder)

    flags = ["--prompt", "x", "--max-tokens", "3000", "--ignore-eos", "--temperature", "0"]
    command = [sys.executable, "-m", "chiasm", "generate", "--endpoint", stack.address("gateway")]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    wait_until(lambda: stack.decoder_load(decoder).running_requests, "the request runs")
    process.kill()
    process.wait()
    stack.wait_idle(decoder)


def test_encoder_drops_what_nobody_waits_for(stack: Cluster, client: Client) -> None:
    (encoder,) = stack.running("vision-encoder")
    before = stack.encoder_load(encoder).encoded_patches
    big = [image(bitmap(1200, seed)) for seed in range(8)]
    running = Stream(stack.endpoint, [user(*big)], GREEDY)
    wait_until(lambda: stack.encoder_load(encoder).queued_items >= 4, "a queue")
    running.cancel()
    wait_until(lambda: not stack.encoder_load(encoder).queued_items, "the queue is empty")
    encoded = stack.encoder_load(encoder).encoded_patches - before
    per_image = client.count_tokens([user(big[0])]).prompt_image_tokens * 4
    assert encoded <= 5 * per_image
    assert stack.encoder_load(encoder).queued_patches == 0


def bitmap(side: int, seed: int) -> bytes:
    """Large, and made quickly."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "BMP")
    return file.getvalue()


def test_deadline(stack: Cluster) -> None:
    (decoder,) = stack.running("decoder")
    running = Stream(stack.endpoint, TEXT, ENDLESS, timeout_s=1.0)
    running.wait_tokens(1)
    with pytest.raises(errors.DeadlineExceeded):
        running.result()
    stack.wait_idle(decoder)


def test_abort(stack: Cluster) -> None:
    (decoder,) = stack.running("decoder")
    running = Stream(stack.endpoint, TEXT, ENDLESS, request_id="to-be-aborted")
    running.wait_tokens(5)
    stack.abort(decoder, "to-be-aborted")
    with pytest.raises(errors.FailedPrecondition) as caught:
        running.result()
    assert caught.value.reason == "ABORTED"
    stack.wait_idle(decoder)


def test_sigterm_drains(stack: Cluster, peace: Peace) -> None:
    """What runs ends well, what comes goes elsewhere, and the processes exit with 0."""
    prompts = [TEXT, picture_prompt(7)] * 2
    expected = [peace.answer(prompt) for prompt in prompts]
    likes = ("decoder", "text-pool-0", "vision-pool-0", "vision-encoder")
    for name in [stack.add(like, wait=False) for like in likes]:
        stack.wait_ready(name)
    victims = [stack.running(like)[0] for like in likes]
    running = [start(stack, prompt) for prompt in prompts]
    for stream in running:
        stream.wait_tokens(5)
    for victim in victims:
        stack.terminate(victim)
    running += [start(stack, prompt) for prompt in prompts]
    for stream, answer in zip(running, expected * 2, strict=True):
        assert_same(stream.result(), answer)
    assert [stack.wait_exit(victim) for victim in victims] == [0] * len(victims)


def test_sigterm_drains_a_gateway(stack: Cluster, peace: Peace) -> None:
    expected = peace.answer(TEXT)
    victim = stack.add("gateway")
    with Client(stack.address(victim)) as other:
        endpoint = stack.address(victim)
        running = [start(stack, TEXT, endpoint=endpoint) for _ in range(3)]
        for stream in running:
            stream.wait_tokens(5)
        stack.terminate(victim)
        wait_until(lambda: stack.state(victim) is not MemberState.READY, "it drains")
        with pytest.raises(errors.Unavailable):
            other.complete(TEXT, sampling=GREEDY)
        for stream in running:
            assert_same(stream.result(), expected)
    assert stack.wait_exit(victim) == 0
    assert_same(start(stack, TEXT).result(), expected)


def test_sixty_requests_with_random_cancellations(stack: Cluster, peace: Peace) -> None:
    (decoder,) = stack.running("decoder")
    short = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = [TEXT, picture_prompt(8), "A short one.", picture_prompt(9)]
    expected = [peace.answer(prompt, short) for prompt in prompts]
    before = ledger(stack)
    resident = []
    for seed in range(3):
        draw = random.Random(seed)
        streams = [start(stack, prompts[i % 4], short) for i in range(60)]
        given_up = {i: draw.uniform(0, 3) for i in draw.sample(range(60), 20)}
        for i in sorted(given_up, key=given_up.__getitem__):
            time.sleep(draw.uniform(0, 0.1))
            streams[i].cancel()
        for i, stream in enumerate(streams):
            if i in given_up:
                stream.wait_end()
            else:
                assert_same(stream.result(), expected[i % 4])
        stack.wait_idle(decoder)
        resident.append(stack.resident_bytes(decoder))
    wait_until(lambda: not ledger(stack)["in flight"], "nothing is in flight")
    after = ledger(stack)
    assert after["accepted"] == after["finished"] + after["failed"]
    assert after["finished"] - before["finished"] >= 120
    assert resident[2] - resident[1] < MAX_GROWTH_BYTES


def test_what_does_not_come_back_is_unavailable(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """One part after the other dies for good; every refusal says when to come back."""
    with running_cluster(tiny_checkpoint, tmp_path, park_timeout_s=1.5, text_servers=1) as stack:
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


def ledger(stack: Cluster) -> dict[str, float]:
    """The gateway's books."""
    samples = stack.metrics("gateway")

    def total(name: str) -> float:
        return sum(v for k, v in samples.items() if k.startswith(f"chiasm_requests_{name}"))

    return {
        "accepted": total("accepted_total"),
        "finished": total("finished_total"),
        "failed": total("failed_total"),
        "in flight": total("in_flight"),
    }


def chiasm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chiasm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
