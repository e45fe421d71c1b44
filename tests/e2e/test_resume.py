"""kill -9 of a decoder in mid-stream: the client's stream goes on, with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster

from chiasm.client import Client, Prompt, Sampling, image, user
from chiasm.local import StackConfig

NUM_TOKENS = 150
GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SEEDED = Sampling(
    max_tokens=NUM_TOKENS,
    temperature=0.9,
    top_p=0.95,
    seed=11,
    frequency_penalty=0.3,
    min_tokens=90,
)
PROMPTS: dict[str, Prompt] = {
    "text": [user("Tell me of the sea, the wind and the rain.")],
    "image": [user(image(png(picture(84, 112, 5))), "What is in the picture?")],
}


@pytest.fixture(scope="module")
def stack(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = StackConfig(
        model=tiny_checkpoint, dtype="float32", log_dir=tmp_path_factory.mktemp("logs")
    )
    with cluster(config) as running:
        yield running


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_streams_outlive_their_decoder(stack: Cluster, sampling: Sampling) -> None:
    """Two decoders share four streams; one is killed, then the one that took its streams over."""
    with Client(stack.endpoint) as client:
        expected = {name: client.complete(p, sampling=sampling) for name, p in PROMPTS.items()}
    stack.add("decoder")
    streams = {
        (name, i): Stream(stack.endpoint, p, sampling)
        for i in range(2)
        for name, p in PROMPTS.items()
    }
    for num_tokens in (15, 60):
        for stream in streams.values():
            stream.wait_tokens(num_tokens)
        victim = stack.running("decoder")[0]
        stack.kill(victim)
        stack.wait_gone(victim)
        stack.add("decoder")
    for (name, _), stream in streams.items():
        found = stream.result()
        assert found.token_ids == expected[name].token_ids
        assert found.text == expected[name].text
        assert found.finish_reason == expected[name].finish_reason
        assert replace(found.usage, cached_tokens=0) == replace(
            expected[name].usage, cached_tokens=0
        )
    assert stack.metrics("gateway")["chiasm_request_resumes_total"] >= 2


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
