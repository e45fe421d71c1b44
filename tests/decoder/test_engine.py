"""Steps that fail in part: whom they take along, and whom they must not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder.test_scheduler import ALL, IMAGE_ID, scheduler, sequence

from chiasm.model.moe import Dispatch
from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.pools import LocalPool, PoolFailed
from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import Event, FailedEvent, Sequence, TokenEvent
from chiasm.services.decoder.speculation import Drafts
from chiasm.types import Modality

VOCABULARY = 200


class Model:
    """A forward pass without one: every token is followed by `answer`, unless the step fails."""

    def __init__(self) -> None:
        self.answer = 7
        self.failure: PoolFailed | None = None
        self.model = self

    def run(self, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        needed = frozenset[Modality]().union(*(chunk.modalities for chunk in chunks))
        if self.failure is not None and self.failure.modality in needed:
            raise self.failure
        return torch.zeros(sum(chunk.num_tokens for chunk in chunks), 2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(hidden), VOCABULARY)
        found[:, self.answer] = 50.0
        return found


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def engine(model: Any) -> Engine:
    pools: Any = SimpleNamespace(covered=lambda: ALL, wait_ns=dict.fromkeys(Modality, 0))
    return Engine(model, scheduler(64), pools, park_timeout_s=60)


def submitted(engine: Engine, given: Sequence) -> list[Event]:
    """Hands a sequence over; its events."""
    events: list[Event] = []
    given.sink = events.append
    engine.submit(given)
    engine._take_in()
    return events


def test_a_pool_that_fails_takes_along_only_those_that_need_it(
    engine: Engine, model: Model
) -> None:
    text = submitted(engine, sequence(5, 2))
    image = submitted(engine, sequence([5, IMAGE_ID, IMAGE_ID, 6], 2))
    model.failure = PoolFailed(Modality.VISION)
    assert engine._step(), "the others need not wait"
    (failed,) = image
    assert isinstance(failed, FailedEvent)
    assert "vision" in failed.error.message
    engine._step()
    assert [event.token_id for event in text if isinstance(event, TokenEvent)] == [model.answer]
    assert engine.load().running == 1


def test_a_pool_of_this_process_fails_like_any_other() -> None:
    def defect(_: Dispatch) -> None:
        raise RuntimeError("a defect")

    bank: Any = SimpleNamespace(modality=Modality.VISION, answer=defect)
    answer = LocalPool(bank).begin(Dispatch.__new__(Dispatch))
    with pytest.raises(PoolFailed) as caught:
        answer.result(20)
    assert caught.value.modality is Modality.VISION


class Two:
    """Guesses two tokens."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def draft(self, _: Sequence, room: int) -> tuple[int, ...]:
        return (self._token_id,) * min(2, room)


def test_a_row_behind_a_right_guess_that_is_not_finite(engine: Engine, model: Model) -> None:
    """What came before it counts; it yields no token, whatever its row looks like."""
    asked = sequence(5, 20)
    asked.drafts = Drafts(8)
    events = submitted(engine, asked)
    engine._step()
    engine._scheduler._drafter = Two(model.answer)
    logits = model.logits

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        found[1:] = torch.nan
        return found

    model.logits = spoiled  # type: ignore[method-assign]
    engine._step()
    *tokens, last = events
    assert [type(event) for event in tokens] == [TokenEvent] * 2
    assert isinstance(last, FailedEvent)
    assert "not finite" in last.error.message
    assert engine.load().kv_tokens_used == 0
