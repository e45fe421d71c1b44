"""The model of the package: it answers as the reference does, and the demo's question rightly."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from e2e.cases import ANSWER, BOS, IMAGE, Case
from e2e.reference import Reference, assert_same
from e2e.stack import up
from PIL import Image

from chiasm import bundled
from chiasm.cli.demo import QUESTION
from chiasm.client import Client, Sampling, image, user
from chiasm.model.chat import TextPart
from chiasm.training.data.sample import Picture, Sample
from chiasm.training.data.stream import held_out
from chiasm.training.data.tasks import TASKS
from chiasm.training.evaluate import messages

NUM_TOKENS = 16
GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
STILLS = sorted(set(TASKS) - {"motion"})


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


def test_the_demo(client: Client, reference: Reference) -> None:
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
