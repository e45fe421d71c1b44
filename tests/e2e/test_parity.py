"""Answers of the whole system, through the gateway, against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from e2e import checkpoints
from e2e.cases import ANSWER, BOS, IMAGE, Case, cases, picture, png
from e2e.reference import Answer, Reference, assert_same
from e2e.stack import up

from chiasm.client import Client, Sampling, image, user

NUM_TOKENS = 32
NUM_TOKENS_AFTER_LONG = 16

MIN_GATE_GAP = 3e-6
"""Experts nearer to each other than this may change places with the rounding."""

GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, seed=0, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A checkpoint and how it is spread: shards and servers of the text and the vision pool."""

    make: Callable[[Path, int], Path]
    seed: int
    text: tuple[int, int]
    vision: tuple[int, int]
    colocate: bool = False

    def flags(self) -> list[str]:
        named = {
            "--text-shards": self.text[0],
            "--text-servers": self.text[1],
            "--vision-shards": self.vision[0],
            "--vision-servers": self.vision[1],
        }
        flags = [str(word) for pair in named.items() for word in pair]
        # The judge's own rule for positions after a video.
        return [*flags, "--video-advance", "transformers", *["--colocate"] * self.colocate]


SETUPS = {
    "hub, one shard": Setup(make=checkpoints.hub, seed=14, text=(1, 1), vision=(1, 1)),
    "hub, 8 text shards on 4": Setup(make=checkpoints.hub, seed=12, text=(8, 4), vision=(2, 2)),
    "native, 8 vision shards on 3": Setup(
        make=checkpoints.native, seed=13, text=(2, 1), vision=(8, 3)
    ),
    "saved by transformers": Setup(make=checkpoints.saved, seed=17, text=(8, 2), vision=(8, 1)),
    "paddle, colocated": Setup(
        make=checkpoints.paddle, seed=22, text=(2, 1), vision=(8, 1), colocate=True
    ),
}


@pytest.fixture(scope="module", params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[str(request.param)]


@pytest.fixture(scope="module")
def directory(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setup.make(tmp_path_factory.mktemp("model"), setup.seed)


@pytest.fixture(scope="module")
def reference(setup: Setup, directory: Path) -> Reference:
    twin = directory.parent / "hub" if setup.make is checkpoints.paddle else directory
    return Reference.of(twin)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, Answer]:
    answers = {case.name: reference.answer(case, NUM_TOKENS) for case in cases()}
    assert reference.min_gate_gap > MIN_GATE_GAP, "two experts are tied: take another seed"
    return answers


@pytest.fixture(scope="module")
def client(setup: Setup, directory: Path) -> Iterator[Client]:
    with up(directory, *setup.flags()) as running:
        yield running


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_one_request(client: Client, case: Case, expected: dict[str, Answer]) -> None:
    assert_same(
        client.complete(case.messages, sampling=GREEDY, prompt_logits=True), expected[case.name]
    )


def test_all_requests_at_once(client: Client, expected: dict[str, Answer]) -> None:
    """Twice each case, all in flight together: nobody's prefill disturbs anybody's decode."""
    batch = [*cases(), *reversed(cases())]
    with ThreadPoolExecutor(len(batch)) as pool:
        running = [
            pool.submit(client.complete, case.messages, sampling=GREEDY, prompt_logits=True)
            for case in batch
        ]
        for case, answer in zip(batch, running, strict=True):
            assert_same(answer.result(), expected[case.name])


def test_a_prompt_longer_than_a_step(client: Client, reference: Reference) -> None:
    """Prefilled in chunks that cut through the image; the rest of the batch decodes meanwhile."""
    pixels = picture(420, 700, 7)
    words = "one two three " * 60
    case = Case(
        name="long",
        messages=[user(words, image(png(pixels)), words)],
        text=f"{BOS}User: {words}Picture 1:{IMAGE}{words}{ANSWER}",
        images=[pixels],
    )
    expected = reference.answer(case, NUM_TOKENS_AFTER_LONG)
    assert len(expected.prompt_token_ids) > 512
    sampling = replace(GREEDY, max_tokens=NUM_TOKENS_AFTER_LONG)
    assert_same(client.complete(case.messages, sampling=sampling, prompt_logits=True), expected)
