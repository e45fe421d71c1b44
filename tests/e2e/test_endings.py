"""Requests given up and processes told to end: nothing is lost, nothing is left behind."""

from __future__ import annotations

import io
import random
import subprocess
import time

import grpc
import numpy as np
import pytest
from e2e.cli import CHIASM
from e2e.cluster import Cluster, Stream, wait_until
from e2e.disturbed import ENDLESS, GREEDY, TEXT, Peace, assert_same, picture_prompt, start
from PIL import Image

from chiasm import errors
from chiasm.client import Client, Sampling, image, user
from chiasm.membership import MemberState
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc, inference_pb2

MAX_GROWTH_BYTES = 24 << 20
"""What a decoder's memory may grow by over 60 requests like 60 before them."""


def test_client_cancels_or_dies(stack: Cluster) -> None:
    (decoder,) = stack.running("decoder")
    with Client(stack.endpoint) as client:
        events = client.generate(TEXT, sampling=ENDLESS)
        for _ in range(20):
            next(events)
        load = stack.decoder_load(decoder)
        assert load.running_requests == 1
        assert load.kv_tokens_used > 0
        events.close()  # type: ignore[attr-defined]
        stack.wait_idle(decoder)

    flags = ["--prompt", "x", "--max-tokens", "3000", "--ignore-eos", "--temperature", "0"]
    command = [*CHIASM, "generate", "--endpoint", stack.endpoint, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: stack.decoder_load(decoder).running_requests, "the request runs")
    process.kill()
    process.wait()
    stack.wait_idle(decoder)


def test_encoder_drops_what_nobody_waits_for(stack: Cluster) -> None:
    (encoder,) = stack.running("vision-encoder")
    before = stack.encoder_load(encoder).encoded_patches
    big = [image(bitmap(1200, seed)) for seed in range(8)]
    running = Stream(stack.endpoint, [user(*big)], GREEDY)
    wait_until(lambda: stack.encoder_load(encoder).queued_items >= 4, "a queue")
    running.cancel()
    wait_until(lambda: not stack.encoder_load(encoder).queued_items, "the queue is empty")
    encoded = stack.encoder_load(encoder).encoded_patches - before
    with Client(stack.endpoint) as client:
        per_image = client.count_tokens([user(big[0])]).prompt_image_tokens * 4
    assert encoded < len(big) * per_image
    assert stack.encoder_load(encoder).queued_patches == 0


def bitmap(side: int, seed: int) -> bytes:
    """Large, and made quickly."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "BMP")
    return file.getvalue()


def test_deadline(stack: Cluster) -> None:
    (decoder,) = stack.running("decoder")
    running = Stream(stack.endpoint, TEXT, ENDLESS, timeout_s=3.0)
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


def test_a_second_call_waits_for_the_first_with_its_id(stack: Cluster) -> None:
    """For a moment: a gateway may be back before the decoder has noticed that it was away."""
    (decoder,) = stack.running("decoder")
    request = decoder_pb2.DecodeRequest(
        request_id="twice",
        token_ids=[5, 6, 7],
        token_types=bytes(3),
        sampling=inference_pb2.SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True),
    )
    with grpc.insecure_channel(stack.address(decoder)) as channel:
        decode = decoder_pb2_grpc.DecoderStub(channel).Decode
        first = decode(request, timeout=60)
        next(first)
        with pytest.raises(grpc.RpcError) as caught:
            next(decode(request, timeout=60))
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        second = decode(request, timeout=60)
        first.cancel()
        next(second)
        second.cancel()
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
