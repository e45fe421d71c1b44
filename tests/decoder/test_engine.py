"""Steps that fail in part: whom they take along, and whom they must not."""

from __future__ import annotations

import math
from dataclasses import replace
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder.test_scheduler import ALL, IMAGE_ID, scheduler, sequence

from chiasm import errors
from chiasm.model.moe import Dispatch
from chiasm.services.decoder.engine import Engine, EngineLoad
from chiasm.services.decoder.pools import LocalPool, PoolFailed
from chiasm.services.decoder.sampler import PROMPT_ROWS
from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import (
    Event,
    FailedEvent,
    FinishedEvent,
    PromptLogprobsEvent,
    Sequence,
    TokenEvent,
)
from chiasm.services.decoder.speculation import Drafts
from chiasm.types import Modality

VOCABULARY = 200
WAIT_S = 20.0
POOLS: Any = SimpleNamespace(
    covered=lambda: ALL, wait_ns=dict.fromkeys(Modality, 0), tidy=lambda: None
)


class Model:
    """A forward pass without one: every token is followed by `answer`, unless the step fails."""

    def __init__(self) -> None:
        self.answer = 7
        self.failure: Exception | None = None
        self.num_rows: list[int] = []
        self.model = self

    def run(self, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        needed = frozenset[Modality]().union(*(chunk.modalities for chunk in chunks))
        is_hit = not isinstance(self.failure, PoolFailed) or self.failure.modality in needed
        if self.failure is not None and is_hit:
            raise self.failure
        return torch.zeros(sum(chunk.num_tokens for chunk in chunks), 2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_rows.append(len(hidden))
        found = torch.zeros(len(hidden), VOCABULARY)
        found[:, self.answer] = 50.0
        return found


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def engine(model: Any) -> Engine:
    return Engine(model, scheduler(64), POOLS, park_timeout_s=60)


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


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RuntimeError("a defect"), errors.Internal),
        (torch.OutOfMemoryError("out of memory"), errors.Unavailable),
    ],
)
@pytest.mark.parametrize("is_colocated", [False, True])
def test_a_step_that_fails_takes_along_nobody_else(
    model: Any, failure: Exception, expected: type[errors.ChiasmError], is_colocated: bool
) -> None:
    if is_colocated:
        pool_failed = PoolFailed(Modality.TEXT)
        pool_failed.__cause__, failure = failure, pool_failed
    engine = Engine(model, scheduler(64, max_running=1), POOLS, park_timeout_s=60)
    first, second = submitted(engine, sequence(5, 2)), submitted(engine, sequence(5, 1))
    model.failure = failure
    assert engine._step()
    (failed,) = first
    assert isinstance(failed, FailedEvent)
    assert isinstance(failed.error, expected)
    model.failure = None
    assert engine._step()
    assert [type(event) for event in second] == [TokenEvent, FinishedEvent]
    assert engine.pulse.stalled_s() < math.inf


@pytest.mark.parametrize("is_colocated", [False, True])
def test_a_lost_device_is_a_matter_for_another_decoder(
    engine: Engine, model: Model, is_colocated: bool
) -> None:
    """Nobody's answer ends for it, and nobody comes to a decoder that would fail at once."""
    running, waiting = submitted(engine, sequence(5, 2)), submitted(engine, sequence(5, 2))
    model.failure = torch.AcceleratorError("CUDA error: an illegal memory access")
    if is_colocated:
        pool_failed = PoolFailed(Modality.TEXT)
        pool_failed.__cause__, model.failure = model.failure, pool_failed
    assert engine._step()
    for (event,) in (running, waiting):
        assert isinstance(event, FailedEvent)
        assert isinstance(event.error, errors.Unavailable)
        assert event.error.reason == errors.Unavailable.default_reason
    assert engine.pulse.stalled_s() == math.inf
    with pytest.raises(errors.Unavailable):
        engine.submit(sequence(5, 2))
    assert engine.load().kv_tokens_used == 0


def test_what_a_spoiled_request_has_computed_is_not_found_again(
    engine: Engine, model: Model
) -> None:
    """Keys and values of a prefix that many share would spoil them all, until it is evicted."""
    logits = model.logits
    model.logits = lambda hidden: logits(hidden) * torch.nan  # type: ignore[method-assign]
    events = submitted(engine, sequence(40, 2))
    while not events:
        engine._step()
    assert isinstance(events[0], FailedEvent)
    model.logits = logits  # type: ignore[method-assign]
    again = sequence(40, 1)
    events = submitted(engine, again)
    while not events:
        engine._step()
    assert isinstance(events[0], TokenEvent)
    assert again.num_cached == 0
    engine._scheduler.blocks.check()


def test_logits_of_a_prompt_are_computed_bit_by_bit(model: Any) -> None:
    """A chunk of a large step would take gigabytes with a large vocabulary."""
    engine = Engine(model, scheduler(100, max_step_tokens=190), POOLS, park_timeout_s=60)
    asked = sequence([n % VOCABULARY for n in range(300)], 1)
    asked.sampling = replace(asked.sampling, prompt_logprobs=0)
    events = submitted(engine, asked)
    while not any(isinstance(event, FinishedEvent) for event in events):
        engine._step()
    told = [event for event in events if isinstance(event, PromptLogprobsEvent)]
    places = [event.offset + i for event in told for i in range(len(event.tokens))]
    assert places == list(range(1, 300))
    ids = [token.token_id for event in told for token in event.tokens]
    assert ids == asked.token_ids[1:300]
    assert max(model.num_rows) <= PROMPT_ROWS


def test_as_many_arrive_at_once_as_have_a_place(model: Any) -> None:
    target = scheduler(64, max_running=4, max_waiting=1)
    engine = Engine(model, target, POOLS, park_timeout_s=60)
    asked = [sequence(5, 9) for _ in range(5)]
    heard: list[Event] = []
    for each in asked:
        each.sink = heard.append
        engine.submit(each)
    engine._take_in()
    engine._step()
    assert len(target.running) == 4
    # One that has gone leaves its place in the queue at once.
    asked[-1].aborted = True
    engine.submit(sequence(5, 9))
    engine._take_in()
    assert not [event for event in heard if isinstance(event, FailedEvent)]
    assert len(target.waiting) == 1


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


class Watched(Model):
    """Every step waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.began: Queue[set[int]] = Queue()
        self.may_go_on: Queue[None] = Queue()

    def run(self, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        self.began.put({id(chunk.sequence) for chunk in chunks})
        self.may_go_on.get(timeout=WAIT_S)
        return super().run(chunks)


def test_who_goes_away_during_a_step_is_not_in_the_next() -> None:
    """Nor does it hold any blocks then, whether it ran or waited for a place."""
    model: Any = Watched()
    engine = Engine(model, scheduler(64, max_running=2), POOLS, park_timeout_s=60)
    stays, goes, waits = sequence(5, 90), sequence(6, 90), sequence(7, 90)
    for given in (stays, goes, waits):
        given.sink = lambda _: None
        engine.submit(given)
    engine.start()
    try:
        assert model.began.get(timeout=WAIT_S) == {id(stays), id(goes)}
        engine.abort(goes)
        engine.abort(waits)
        model.may_go_on.put(None)
        assert model.began.get(timeout=WAIT_S) == {id(stays)}
        assert not goes.table.blocks
        blocks = stays.table.blocks
        assert engine.load() == EngineLoad(
            running=1,
            waiting=0,
            kv_tokens_used=len(blocks) * engine._scheduler.blocks.block_size,
            kv_tokens_total=engine.load().kv_tokens_total,
        )
        engine.abort(stays)
    finally:
        for _ in range(2):
            model.may_go_on.put(None)
        engine.close()
    assert engine.load().kv_tokens_used == 0
