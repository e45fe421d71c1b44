"""The events of an answer, put together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from chiasm import errors
from chiasm.client import events


class _Choice:
    """One of the answers, as far as it has come."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning_text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[events.TokenLogprobs] = []
        self.finished: events.ChoiceFinished | None = None

    def add(self, delta: events.Delta) -> None:
        self.text.append(delta.text)
        self.reasoning_text.append(delta.reasoning_text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)

    def result(self) -> events.Choice:
        if self.finished is None:
            raise errors.DataLoss("the answer ended before it was complete")
        return events.Choice(
            index=self.finished.index,
            text="".join(self.text),
            reasoning_text="".join(self.reasoning_text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finished.reason,
            stop=self.finished.stop,
        )


class Assembler:
    """Puts the events of one request together."""

    def __init__(self) -> None:
        self._started: events.Started | None = None
        self._finished: events.Finished | None = None
        self._choices: dict[int, _Choice] = {}
        self._rows: list[events.Logits] = []
        self._num_rows = self._total_rows = 0
        self._prompt_logprobs: list[events.TokenLogprobs] = []

    def add(self, new: events.Event) -> None:
        """Takes the next event. Raises DataLoss when something of the prompt's is missing."""
        match new:
            case events.Started():
                self._started = new
            case events.Delta():
                self._choice(new.index).add(new)
            case events.ChoiceFinished():
                self._choice(new.index).finished = new
            case events.PromptLogits():
                if new.row_offset != self._num_rows:
                    raise errors.DataLoss(f"prompt_logits: row {self._num_rows} is missing")
                self._rows.append(new.rows)
                self._num_rows += len(new.rows)
                self._total_rows = new.total_rows
            case events.PromptLogprobs():
                if new.offset != len(self._prompt_logprobs) + 1:
                    raise errors.DataLoss("prompt_logprobs: tokens are missing")
                self._prompt_logprobs.extend(new.tokens)
            case events.Finished():
                self._finished = new

    def result(self) -> events.Result:
        """The whole answer. Raises DataLoss when its stream ended early."""
        if (
            self._started is None
            or self._finished is None
            or not self._choices
            or self._num_rows != self._total_rows
        ):
            raise errors.DataLoss("the answer ended before it was complete")
        return events.Result(
            request_id=self._started.request_id,
            seed=self._started.seed,
            model=self._started.model,
            choices=tuple(self._choices[index].result() for index in sorted(self._choices)),
            prompt_token_ids=self._started.prompt_token_ids,
            prompt_logprobs=tuple(self._prompt_logprobs),
            usage=self._finished.usage,
            timings=self._finished.timings,
            prompt_logits=np.concatenate(self._rows) if self._rows else None,
        )

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())


def assemble(answer: Iterable[events.Event]) -> events.Result:
    """The whole answer of a finished stream of events."""
    assembler = Assembler()
    for new in answer:
        assembler.add(new)
    return assembler.result()
