"""`chiasm eval`: its arithmetic, against clients that know or err, and on a system of random
weights."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import looking
import pytest
from e2e.stack import up
from typer.testing import CliRunner

from chiasm import errors
from chiasm.cli import app
from chiasm.cli.eval import table
from chiasm.client import Choice, Client, Message, Result, Sampling, Text, Timings, Usage
from chiasm.model.chat import TextPart
from chiasm.training.data.encode import Encoder
from chiasm.training.data.sample import Sample
from chiasm.training.data.stream import held_out
from chiasm.training.data.tasks import TASKS
from chiasm.training.evaluate import Score, document, evaluate, messages, wilson

NUM_SAMPLES = 6
RUN_TIMEOUT_S = 120


def result(text: str) -> Result:
    choice = Choice(
        index=0,
        text=text,
        reasoning_text="",
        token_ids=(),
        logprobs=(),
        finish_reason="stop",
        stop=None,
    )
    return Result(
        request_id="r",
        model="m",
        seed=0,
        choices=(choice,),
        prompt_token_ids=(),
        prompt_logprobs=(),
        usage=Usage(
            prompt_tokens=0,
            prompt_text_tokens=0,
            prompt_image_tokens=0,
            prompt_video_tokens=0,
            completion_tokens=0,
        ),
        timings=Timings(**dict.fromkeys(Timings.__slots__, 0)),
        prompt_logits=None,
    )


class Known:
    """Has the answer to every question of the samples, found by all that is sent."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._answers = {repr(messages(sample)): sample.answer for sample in samples}
        self.samplings: list[Sampling] = []
        self.running = self.most_running = 0

    async def complete(
        self, prompt: Sequence[Message], *, sampling: Sampling, timeout_s: float | None
    ) -> Result:
        assert timeout_s is not None
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        self.samplings.append(sampling)
        return result(f" {self._answers[repr(prompt)]}\n")


def known(num_samples: int = NUM_SAMPLES) -> Known:
    return Known([sample for task in TASKS for sample in held_out(task, num_samples)])


async def test_the_right_answers_are_all_right() -> None:
    client, begun = known(), list[str]()
    scores = await evaluate(client, NUM_SAMPLES, on_task=begun.append)
    assert [score.task for score in scores] == begun == list(TASKS)
    for score in scores:
        assert (score.num_samples, score.num_correct) == (NUM_SAMPLES, NUM_SAMPLES)
        assert (score.accuracy, score.is_passed, score.mistakes) == (1.0, True, ())
        assert score.threshold == TASKS[score.task].threshold
    assert {sampling.temperature for sampling in client.samplings} == {0}
    assert 1 < client.most_running <= 8
    assert document(scores)["passed"] is True


class Wrong:
    async def complete(
        self, prompt: Sequence[Message], *, sampling: Sampling, timeout_s: float | None
    ) -> Result:
        return result("no idea")


async def test_wrong_answers_are_counted_and_shown() -> None:
    (score,) = await evaluate(Wrong(), 9, tasks=["sums"])
    assert (score.num_correct, score.accuracy, score.is_passed) == (0, 0.0, False)
    first = held_out("sums", 9)[0]
    assert score.mistakes[0].expected == first.answer
    assert score.mistakes[0].answered == "no idea"
    assert score.mistakes[0].question == looking.question(first)
    assert len(score.mistakes) == 5
    row: Any = document([score])
    assert (row["passed"], row["tasks"][0]["passed"]) == (False, False)


class Failing:
    async def complete(
        self, prompt: Sequence[Message], *, sampling: Sampling, timeout_s: float | None
    ) -> Result:
        raise errors.Unavailable("gone")


async def test_a_failed_request_ends_the_evaluation() -> None:
    with pytest.raises(errors.Unavailable):
        await evaluate(Failing(), 3, tasks=["sums"])


@pytest.mark.parametrize("count", [0, -1, 10_001])
async def test_number_of_samples(count: int) -> None:
    with pytest.raises(errors.InvalidArgument):
        await evaluate(Wrong(), count)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe 1998, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_score_at_its_threshold_passes() -> None:
    at = Score(task="sums", num_samples=50, num_correct=49, threshold=0.98)
    below = Score(task="sums", num_samples=50, num_correct=48, threshold=0.98)
    assert (at.is_passed, below.is_passed) == (True, False)
    assert table([at, below]).row_count == 2


def test_media_and_text_are_sent_in_their_order() -> None:
    for task in ("same", "motion", "digits"):
        for sample in held_out(task, 8):
            (sent,) = messages(sample)
            kinds = ["text" if isinstance(part, Text) else part.kind for part in sent.parts]
            parts = sample.messages[0].parts
            assert kinds == ["text" if isinstance(p, TextPart) else p.kind for p in parts]
            starts = [part.data[:8] for part in sent.parts if not isinstance(part, Text)]
            assert all(
                start[4:] == b"ftyp" if task == "motion" else start == b"\x89PNG\r\n\x1a\n"
                for start in starts
            )


@pytest.fixture(scope="module")
def running(random_model: Path) -> Iterator[Client]:
    with up(random_model, "--colocate") as client:
        yield client


def test_prompts_are_those_that_the_services_see(running: Client, random_model: Path) -> None:
    encoder = Encoder.load(random_model)
    for task in TASKS:
        (sample,) = held_out(task, 1)
        example = encoder.encode(sample)
        answered = running.complete(messages(sample), sampling=Sampling(max_tokens=1))
        expected = example.token_ids[~example.labels_mask].tolist()
        assert list(answered.prompt_token_ids) == expected


def test_command_on_random_weights(running: Client, tmp_path: Path) -> None:
    """Nothing is right, and that is said in every form."""
    file = tmp_path / "scores.json"
    done = chiasm_eval(running._endpoint, "--samples", "2", "--json", str(file))
    assert done.returncode == 1, done.stderr
    scores = json.loads(file.read_text())
    assert scores["passed"] is False
    assert [row["task"] for row in scores["tasks"]] == list(TASKS)
    for row in scores["tasks"]:
        assert row["num_samples"] == 2
        assert row["accuracy"] <= 0.5
        assert 0 <= row["wilson_95"][0] <= row["accuracy"] <= row["wilson_95"][1] <= 1
        assert any(row["task"] in line and "fail" in line for line in done.stdout.splitlines())


def test_scores_are_written_before_they_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "scores.json", list[Any]()
    score = Score(task="sums", num_samples=2, num_correct=2, threshold=0.98)
    command = import_module("chiasm.cli.eval")

    async def scores(*_: object) -> list[Score]:
        return [score]

    monkeypatch.setattr(command, "_evaluate", scores)
    monkeypatch.setattr(command, "table", lambda _: seen.append(json.loads(file.read_text())))
    done = CliRunner().invoke(app, ["eval", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert seen == [document([score])]


def test_command_without_a_system_or_a_folder(tmp_path: Path) -> None:
    done = chiasm_eval("127.0.0.1:1", "--json", str(tmp_path / "none" / "scores.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--json" in done.stderr


def chiasm_eval(endpoint: str, *flags: str) -> subprocess.CompletedProcess[str]:
    program = "from chiasm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "eval", "--endpoint", endpoint, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
