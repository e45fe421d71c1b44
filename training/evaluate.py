"""How well a running system answers held-out questions: every task, greedily, through its gateway.

An answer counts when it is exactly the expected one, spaces around it aside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chiasm.client import Media, Message, Result, Sampling, Text
from chiasm.errors import InvalidArgument
from chiasm.model.chat import TextPart
from chiasm.training.data.files import to_mp4, to_png
from chiasm.training.data.sample import Clip, Picture, Sample
from chiasm.training.data.stream import held_out
from chiasm.training.data.tasks import TASKS
from chiasm.types import MediaKind

MAX_SAMPLES = 10_000
_MAX_ANSWER_TOKENS = 40
_CONCURRENCY = 8
_TIMEOUT_S = 120.0
_MAX_MISTAKES = 5
_Z95 = 1.959963984540054


class Answerer(Protocol):
    """What evaluation needs of `chiasm.client.AsyncClient`."""

    async def complete(
        self, prompt: Sequence[Message], *, sampling: Sampling, timeout_s: float | None
    ) -> Result: ...


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong answer."""

    question: str
    expected: str
    answered: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The outcome of a task; `mistakes` are the first few."""

    task: str
    num_samples: int
    num_correct: int
    threshold: float
    mistakes: tuple[Mistake, ...] = ()

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %."""
        return wilson(self.num_correct, self.num_samples)

    @property
    def is_passed(self) -> bool:
        return self.accuracy >= self.threshold


async def evaluate(
    client: Answerer,
    num_samples: int,
    *,
    tasks: Iterable[str] = tuple(TASKS),
    on_task: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """Scores of the tasks, `num_samples` of each, or as many as it holds out.

    `on_task` hears the name of each task as it begins. Raises the first error of a request, the
    others being cancelled then.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise InvalidArgument("samples", f"must lie in 1..{MAX_SAMPLES}, not {num_samples}")
    scores = []
    for task in tasks:
        on_task(task)
        samples = await asyncio.to_thread(held_out, task, num_samples)
        scores.append(await _evaluate(client, task, samples))
    return scores


async def _evaluate(client: Answerer, task: str, samples: Sequence[Sample]) -> Score:
    answers: dict[int, str] = {}
    waiting = iter(enumerate(samples))

    async def work() -> None:
        for index, sample in waiting:
            answers[index] = await answer(client, sample)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_CONCURRENCY):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    mistakes = [
        Mistake(question(sample), sample.answer, answers[index])
        for index, sample in enumerate(samples)
        if answers[index] != sample.answer
    ]
    return Score(
        task=task,
        num_samples=len(samples),
        num_correct=len(samples) - len(mistakes),
        threshold=TASKS[task].threshold,
        mistakes=tuple(mistakes[:_MAX_MISTAKES]),
    )


async def answer(client: Answerer, sample: Sample) -> str:
    """What the system says to a sample's question."""
    prompt = await asyncio.to_thread(messages, sample)
    sampling = Sampling(max_tokens=_MAX_ANSWER_TOKENS, temperature=0)
    result = await client.complete(prompt, sampling=sampling, timeout_s=_TIMEOUT_S)
    return result.text.strip()


def question(sample: Sample) -> str:
    """The text of a sample's question."""
    parts = sample.messages[-1].parts
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def messages(sample: Sample) -> list[Message]:
    """A sample's conversation as a client sends it: pictures as PNG, videos as MP4 files."""

    files = [_file(item) for item in sample.media]
    return [
        Message(
            role=message.role,
            parts=tuple(
                Text(part.text) if isinstance(part, TextPart) else files[part.index]
                for part in message.parts
            ),
        )
        for message in sample.messages
    ]


def _file(item: Clip | Picture) -> Media:
    if isinstance(item, Clip):
        return Media(kind=MediaKind.VIDEO, data=to_mp4(item))
    return Media(kind=MediaKind.IMAGE, data=to_png(item.pixels))


def wilson(num_correct: int, num_samples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927): it stays within 0..1 and is sound for
    shares near either end."""
    z2 = _Z95**2
    share = num_correct / num_samples
    middle = share + z2 / (2 * num_samples)
    reach = _Z95 * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    scale = 1 + z2 / num_samples
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def document(scores: Sequence[Score]) -> dict[str, object]:
    """The scores as one JSON object."""
    return {
        "passed": all(score.is_passed for score in scores),
        "tasks": [
            {
                "task": score.task,
                "num_samples": score.num_samples,
                "num_correct": score.num_correct,
                "accuracy": score.accuracy,
                "wilson_95": list(score.interval),
                "threshold": score.threshold,
                "passed": score.is_passed,
                "mistakes": [dataclasses.asdict(mistake) for mistake in score.mistakes],
            }
            for score in scores
        ],
    }
