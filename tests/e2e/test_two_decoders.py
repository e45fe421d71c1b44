"""Two decoders: who takes what, what is computed once, and speculation, which nobody may notice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster

from chiasm.client import Client, Prompt, Result, Sampling, image, user
from chiasm.local import StackConfig

BLOCK_SIZE = 16
STORY = "The cat sat on the mat. The dog sat on the log. The cat saw the dog. "
PREFILLED = 'chiasm_decoder_tokens_total{modality="text",phase="prefill"}'


@pytest.fixture(scope="module")
def stack(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = StackConfig(
        model=tiny_checkpoint, dtype="float32", log_dir=tmp_path_factory.mktemp("logs")
    )
    with cluster(config) as running:
        running.add("decoder")
        yield running


@pytest.fixture
def client(stack: Cluster) -> Iterator[Client]:
    with Client(stack.endpoint, timeout_s=60) as opened:
        yield opened


def counts(stack: Cluster, sample: str) -> list[float]:
    """A decoder metric, of either decoder."""
    return [stack.metrics(name).get(sample, 0.0) for name in stack.running("decoder")]


def test_the_answers_to_one_request_compute_its_prompt_once(stack: Cluster, client: Client) -> None:
    """All go to one decoder, and are those of separate requests with their seeds."""
    prompt: Prompt = [user(STORY * 8)]
    sampling = Sampling(max_tokens=12, temperature=1.1, seed=40, n=4)
    before = counts(stack, PREFILLED)
    found = client.complete(prompt, sampling=sampling)
    grown = [b - a for a, b in zip(before, counts(stack, PREFILLED), strict=True)]
    num_prompt = found.usage.prompt_tokens
    assert num_prompt > 10 * BLOCK_SIZE
    assert sorted(grown)[0] == 0
    assert num_prompt <= sum(grown) <= num_prompt + 3 * BLOCK_SIZE
    assert found.usage.cached_tokens == 0
    for choice in found.choices:
        single = Sampling(max_tokens=12, temperature=1.1, seed=40 + choice.index)
        assert client.complete(prompt, sampling=single).token_ids == choice.token_ids


def test_cached_tokens_are_reported(stack: Cluster, client: Client) -> None:
    prompt: Prompt = [user("Once upon a time. " * 20)]
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    name = "chiasm_cached_prompt_tokens_total"
    before = stack.metrics("gateway")[name]
    first, again = (client.complete(prompt, sampling=sampling).usage for _ in range(2))
    assert first.cached_tokens == 0
    expected = (first.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again.cached_tokens == expected > 0
    assert stack.metrics("gateway")[name] - before == expected


def test_embeddings_are_fetched_once(stack: Cluster, client: Client) -> None:
    prompt: Prompt = [user(image(png(picture(84, 112, 77))), "What is in the picture?")]
    names = [f"chiasm_decoder_embedding_cache_{kind}_total" for kind in ("hits", "misses")]
    before = [sum(counts(stack, name)) for name in names]
    for _ in range(3):
        client.complete(prompt, sampling=Sampling(max_tokens=1, temperature=0))
    hits, misses = (sum(counts(stack, n)) - b for n, b in zip(names, before, strict=True))
    assert (hits, misses) == (2, 1)
    assert sum(counts(stack, "chiasm_decoder_embedding_cache_bytes")) > 0


PROMPTS: list[Prompt] = [
    [user(STORY * 3)],
    [user("Repeat: one two three one two three one two")],
    [user(image(png(picture(84, 112, 5))), "What is in the picture?")],
    [user("Tell me of the sea, the wind and the rain.")],
]
SAMPLINGS = [
    Sampling(max_tokens=90, temperature=0, ignore_eos=True),
    Sampling(max_tokens=90, temperature=0.6, top_k=4, seed=11, logprobs=1),
]


def ask(stack: Cluster) -> list[Result]:
    """All at once."""

    def one(prompt: Prompt, sampling: Sampling) -> Result:
        with Client(stack.endpoint, timeout_s=120) as client:
            return client.complete(prompt, sampling=sampling)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(one, p, s) for p in PROMPTS for s in SAMPLINGS]
        return [answer.result() for answer in running]


def replace_decoders(stack: Cluster, **settings: str) -> None:
    """Two new decoders with settings of their own; the old ones end."""
    old = stack.running("decoder")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(f"CHIASM_{name}", value)
        for _ in range(2):
            stack.add("decoder")
    for name in old:
        stack.terminate(name)
        stack.wait_gone(name)


def test_speculation_changes_no_token(stack: Cluster) -> None:
    """In batches, in small steps, with too little memory, and when a decoder dies in between."""
    expected = ask(stack)
    replace_decoders(
        stack, SPECULATION="ngram", MAX_STEP_TOKENS="48", KV_CACHE_TOKENS="320", MAX_RUNNING="6"
    )
    assert [found.token_ids for found in ask(stack)] == [e.token_ids for e in expected]
    drafted, accepted = (
        sum(counts(stack, f"chiasm_decoder_{kind}_tokens_total"))
        for kind in ("drafted", "accepted")
    )
    assert 0 < accepted < drafted
    assert sum(counts(stack, "chiasm_decoder_preemptions_total")) > 0

    streams = [Stream(stack.endpoint, p, s) for p in PROMPTS for s in SAMPLINGS]
    for stream in streams:
        stream.wait_tokens(8)
    stack.kill(stack.running("decoder")[0])
    for stream, wanted in zip(streams, expected, strict=True):
        assert stream.result().token_ids == wanted.token_ids
