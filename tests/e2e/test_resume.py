"""kill -9 of a decoder or a gateway in mid-stream: the client's stream goes on, with the same
tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster

from chiasm.client import Client, Prompt, Regex, Sampling, image, user
from chiasm.local import StackConfig

NUM_TOKENS = 190
"""Far more than the slowest stream has at the last kill: none of them may have ended by then."""

GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SEEDED = Sampling(
    max_tokens=NUM_TOKENS,
    temperature=0.9,
    top_p=0.95,
    seed=11,
    frequency_penalty=0.3,
    min_tokens=150,
)
FORM = Regex("([a-z]{2} ){115}")
PROMPTS: dict[str, Prompt] = {
    "text": [user("Tell me of the sea, the wind and the rain.")],
    "image": [user(image(png(picture(84, 112, 5))), "What is in the picture?")],
}
REQUESTS: list[tuple[Prompt, Sampling]] = [
    (prompt, sampling) for prompt in PROMPTS.values() for sampling in (GREEDY, SEEDED)
]


@pytest.fixture(scope="module")
def stack(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = StackConfig(
        model=tiny_checkpoint, dtype="float32", log_dir=tmp_path_factory.mktemp("logs")
    )
    with cluster(config) as running:
        yield running


def test_streams_outlive_their_decoder(stack: Cluster) -> None:
    """Greedy and sampled. Three decoders share them; one dies, then the busier of the others."""
    with Client(stack.endpoint) as client:
        expected = [client.complete(p, sampling=s) for p, s in REQUESTS]
    for name in [stack.add("decoder", wait=False) for _ in range(2)]:
        stack.wait_ready(name)
    streams = [Stream(stack.endpoint, p, s) for p, s in REQUESTS * 2]
    for num_tokens in (10, 40):
        for stream in streams:
            stream.wait_tokens(num_tokens)
        busy = {n: stack.decoder_load(n).running_requests for n in stack.running("decoder")}
        victim = max(busy, key=lambda name: busy[name])
        assert busy[victim] >= 2
        stack.kill(victim)
    for stream, wanted in zip(streams, expected * 2, strict=True):
        found = stream.result()
        assert found.token_ids == wanted.token_ids
        assert found.text == wanted.text
        assert found.finish_reason == wanted.finish_reason
        assert replace(found.usage, cached_tokens=0) == replace(wanted.usage, cached_tokens=0)
    assert stack.metrics("gateway")["chiasm_request_resumes_total"] >= 4


def test_what_is_more_than_tokens_outlives_its_decoder(stack: Cluster) -> None:
    """A grammar's state, several answers, the search for a stop string, log-probabilities."""
    prompt = PROMPTS["text"]
    with Client(stack.endpoint) as client:
        text = client.complete(prompt, sampling=SEEDED).text
        late = text[int(0.8 * len(text)) :][:8]
        assert late not in text[: len(text) // 2], "the decoder must die before"
        samplings = [
            replace(SEEDED, min_tokens=0, response_format=FORM),
            replace(SEEDED, n=2),
            replace(SEEDED, stop=(late,), logprobs=2),
        ]
        expected = [client.complete(prompt, sampling=s) for s in samplings]
    for name in [stack.add("decoder", wait=False) for _ in range(2)]:
        stack.wait_ready(name)
    streams = [Stream(stack.endpoint, prompt, s) for s in samplings]
    before = stack.metrics("gateway")["chiasm_request_resumes_total"]
    for num_tokens in (15, 40):
        for stream in streams:
            stream.wait_tokens(num_tokens)
        busy = {n: stack.decoder_load(n).running_requests for n in stack.running("decoder")}
        stack.kill(max(busy, key=lambda name: busy[name]))
    for stream, wanted in zip(streams, expected, strict=True):
        found = stream.result()
        assert [(c.token_ids, c.text, c.finish_reason) for c in found.choices] == [
            (c.token_ids, c.text, c.finish_reason) for c in wanted.choices
        ]
        assert [len(c.logprobs or ()) for c in found.choices] == [
            len(c.logprobs or ()) for c in wanted.choices
        ]
    assert stack.metrics("gateway")["chiasm_request_resumes_total"] >= before + 2


def test_streams_outlive_their_gateways(stack: Cluster) -> None:
    """Two die, one after the other; then a decoder does. A seed that nobody gave stays the same."""
    prompt = PROMPTS["text"]
    several = replace(SEEDED, n=3, seed=None, logprobs=2)
    formed = replace(SEEDED, min_tokens=0, response_format=FORM)
    requests = [*REQUESTS, (prompt, several), (prompt, formed)]
    gateways = [stack.add("gateway", wait=False) for _ in range(2)]
    for name in (*gateways, stack.add("decoder", wait=False)):
        stack.wait_ready(name)
    known = [*map(stack.address, gateways), stack.endpoint]
    streams = [Stream(f"ipv4:{','.join(known)}", p, s) for p, s in requests]
    victims = [*gateways, stack.running("decoder")[0]]
    for victim, num_tokens in zip(victims, (10, 25, 40), strict=True):
        for stream in streams:
            stream.wait_tokens(num_tokens)
        assert not any(stream.is_done for stream in streams)
        if victim in gateways:
            # Not all: a client that gets no connection in time takes the next address.
            assert stack.metrics(victim)["chiasm_requests_in_flight"] >= 1
        stack.kill(victim)
    for stream, (asked, sampling) in zip(streams, requests, strict=True):
        found = stream.result()
        with Client(stack.endpoint) as client:
            wanted = client.complete(asked, sampling=replace(sampling, seed=found.seed))
        assert [(c.token_ids, c.text, c.finish_reason) for c in found.choices] == [
            (c.token_ids, c.text, c.finish_reason) for c in wanted.choices
        ]
        assert [len(c.logprobs) for c in found.choices] == [len(c.logprobs) for c in wanted.choices]
        assert replace(found.usage, cached_tokens=0) == replace(wanted.usage, cached_tokens=0)


def test_the_last_decoder_dies_and_another_comes(stack: Cluster) -> None:
    """With no decoder left the stream waits; it goes on when there is one again."""
    with Client(stack.endpoint) as client:
        expected = client.complete(PROMPTS["image"], sampling=GREEDY)
    stream = Stream(stack.endpoint, PROMPTS["image"], GREEDY)
    stream.wait_tokens(10)
    for name in stack.running("decoder"):
        stack.kill(name)
        stack.wait_gone(name)
    assert not stream.is_done
    stack.add("decoder")
    assert stream.result().token_ids == expected.token_ids
