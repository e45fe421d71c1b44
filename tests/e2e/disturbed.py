"""What tests share that disturb a stack: its settings, requests, and their answers in peace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from e2e.cases import picture, png
from e2e.cluster import Cluster, Stream, cluster

from chiasm.client import Client, Prompt, Result, Sampling, image, user
from chiasm.local import StackConfig

LEASE_MS = 1500
MAX_RUNNING = 8
GREEDY = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
SEEDED = Sampling(max_tokens=60, temperature=0.8, seed=7, ignore_eos=True)
ENDLESS = Sampling(max_tokens=3000, temperature=0, ignore_eos=True)

TEXT: Prompt = [user("Tell me of the sea, the wind and the rain.")]
LOGITS_TOLERANCE = 1e-4


@cache
def picture_prompt(seed: int) -> Prompt:
    """A picture of its own for every seed."""
    return [user(image(png(picture(84, 112, seed))), "What is in the picture?")]


class Peace:
    """Answers of the undisturbed stack, each asked for once."""

    def __init__(self, endpoint: str, sampling: Sampling = GREEDY) -> None:
        self._endpoint, self._sampling = endpoint, sampling
        self._known: dict[str, Result] = {}

    def answer(self, prompt: Prompt, sampling: Sampling | None = None) -> Result:
        sampling = sampling or self._sampling
        key = repr((prompt, sampling))
        if key not in self._known:
            with Client(self._endpoint, timeout_s=60) as client:
                self._known[key] = client.complete(prompt, sampling=sampling, prompt_logits=True)
        return self._known[key]


@contextmanager
def running_cluster(
    model: Path, log_dir: Path, *, park_timeout_s: float, text_servers: int
) -> Iterator[Cluster]:
    """A stack that notices soon who is silent, with a small batch."""
    config = StackConfig(
        model=model, dtype="float32", text_servers=text_servers, grace_s=60, log_dir=log_dir
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHIASM_LEASE_MS", str(LEASE_MS))
        environment.setenv("CHIASM_PARK_TIMEOUT_S", str(park_timeout_s))
        environment.setenv("CHIASM_MAX_RUNNING", str(MAX_RUNNING))
        with cluster(config) as running:
            yield running


def start(
    stack: Cluster, prompt: Prompt, sampling: Sampling = GREEDY, *, endpoint: str = ""
) -> Stream:
    """A request under way that computes all of its prompt."""
    return Stream(endpoint or stack.endpoint, prompt, sampling, prompt_logits=True)


def assert_equal(found: Result, expected: Result) -> None:
    """Bit by bit: of a request that was alone, so that its chunks were the same."""
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    assert found.prompt_logits is not None
    assert expected.prompt_logits is not None
    assert np.array_equal(found.prompt_logits, expected.prompt_logits)


def assert_same(found: Result, expected: Result) -> None:
    """Token by token, and logit by logit as far as chunks of other sizes allow."""
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.prompt_logits is not None
    assert expected.prompt_logits is not None
    assert np.abs(found.prompt_logits - expected.prompt_logits).max() <= LOGITS_TOLERANCE
