"""The model of the package: it answers as the reference does, and rightly."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from e2e.cases import ANSWER, BOS, IMAGE, Case
from e2e.cli import chiasm
from e2e.reference import Reference, assert_same
from e2e.stack import up
from PIL import Image

from chiasm import bundled
from chiasm.cli.demo import QUESTION
from chiasm.client import Client, Message, Result, Sampling, image, user
from chiasm.model.chat import TextPart
from chiasm.model.config import ModelConfig
from chiasm.training.data.sample import Picture, Sample
from chiasm.training.data.stream import held_out
from chiasm.training.data.tasks import TASKS
from chiasm.training.evaluate import evaluate, messages

NUM_TOKENS = 16
GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
STILLS = sorted(set(TASKS) - {"motion"})


@dataclass(frozen=True)
class Asker:
    """A client that several ask at a time."""

    client: Client

    async def complete(
        self, prompt: Sequence[Message], *, sampling: Sampling, timeout_s: float | None
    ) -> Result:
        return await asyncio.to_thread(
            self.client.complete, prompt, sampling=sampling, timeout_s=timeout_s
        )


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with up(bundled.CHECKPOINT, "--text-shards", "4", "--vision-servers", "2") as running:
        yield running


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(bundled.CHECKPOINT)


def case_of(sample: Sample) -> Case:
    text = ""
    for part in sample.messages[0].parts:
        text += part.text if isinstance(part, TextPart) else f"Picture {part.index + 1}:{IMAGE}"
    return Case(
        name=sample.task,
        messages=messages(sample),
        text=f"{BOS}User: {text}{ANSWER}",
        images=[item.pixels for item in sample.media if isinstance(item, Picture)],
    )


@pytest.mark.parametrize("task", STILLS)
def test_questions_it_was_trained_for(client: Client, reference: Reference, task: str) -> None:
    for sample in held_out(task, 3, seed=2):
        case = case_of(sample)
        found = client.complete(case.messages, sampling=GREEDY, prompt_logits=True)
        assert_same(found, reference.answer(case, NUM_TOKENS))


async def test_held_out_questions_are_answered_rightly(client: Client) -> None:
    """Far fewer than docs/training.md has, so a task may have one or two wrong."""
    scores = await evaluate(Asker(client), 10)
    assert {score.task for score in scores} == set(TASKS)
    assert min(score.num_correct for score in scores) >= 8
    assert sum(score.num_correct for score in scores) >= 0.95 * 10 * len(TASKS)


def test_it_is_as_heterogeneous_as_the_published_one_and_small() -> None:
    text = ModelConfig.load(bundled.CHECKPOINT).text
    assert (text.num_experts, text.moe_k) == (64, 6)
    assert text.shared_intermediate == 2 * text.text_intermediate > 2 * text.vision_intermediate
    assert sum(path.stat().st_size for path in bundled.CHECKPOINT.iterdir()) <= 30e6


def test_chiasm_demo() -> None:
    done = chiasm("demo")
    assert done.returncode == 0, done.stderr
    assert "red star" in done.stdout
    assert "stopped all of them" in done.stdout


def test_the_question_of_the_demo(client: Client, reference: Reference) -> None:
    jpeg = bundled.PICTURE.read_bytes()
    case = Case(
        name="demo",
        messages=[user(image(jpeg), QUESTION)],
        text=f"{BOS}User: Picture 1:{IMAGE}{QUESTION}{ANSWER}",
        images=[np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))],
    )
    found = client.complete(case.messages, sampling=GREEDY, prompt_logits=True)
    assert_same(found, reference.answer(case, NUM_TOKENS))
    answer = client.complete(case.messages, sampling=Sampling(temperature=0))
    assert (answer.text, answer.finish_reason) == ("red star", "stop")
