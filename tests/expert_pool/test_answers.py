"""Dispatches on their way to the compute thread and back, step by step and without processes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from expert_pool.test_service import request
from google.rpc import code_pb2

from chiasm.model.config import ModelConfig
from chiasm.model.moe import Partial
from chiasm.pulse import Pulse
from chiasm.services.expert_pool import wire
from chiasm.services.expert_pool.answers import Answers, Received
from chiasm.services.expert_pool.servicer import _Stream
from chiasm.transport.messages import answer_bytes
from chiasm.types import Modality
from chiasm.v1 import experts_pb2


class Worker:
    """Keeps jobs until the test runs them."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.pulse = Pulse()

    @property
    def num_jobs(self) -> int:
        return len(self.jobs)

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def run(self) -> None:
        self.jobs.pop(0)()


class Bank:
    """One row for each shard."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.before: Callable[[int], object] = lambda shard: None

    def partials(self, layer: int, shards: list[int], *_: torch.Tensor) -> Iterator[Partial]:
        for shard in shards:
            self.before(shard)
            yield Partial(
                shard=shard, rows=torch.zeros(1, dtype=torch.int32), values=torch.ones(1, 1)
            )


@dataclass
class Caller:
    """A stream that is never written, unless the test says so."""

    is_gone: bool = False
    arenas: None = None
    answers: list[tuple[experts_pb2.DispatchResponse, int]] = field(default_factory=list)

    def answer(self, response: experts_pb2.DispatchResponse, held: int) -> None:
        self.answers.append((response, held))

    @property
    def codes(self) -> list[int]:
        return [response.error.code for response, _ in self.answers]


@dataclass
class Desk:
    """Answers before a bank, and a caller that asks them."""

    config: ModelConfig
    answers: Answers
    bank: Any
    worker: Worker
    caller: Caller

    def ask(self, *, num_bytes: int = 1000, received_ns: int = 0, **fields: object) -> None:
        self.answers.submit(
            Received(
                request=request(self.config, **fields),  # type: ignore[arg-type]
                caller=self.caller,
                received_ns=received_ns,
                num_bytes=num_bytes,
            )
        )


@pytest.fixture
def desk(config: ModelConfig) -> Desk:
    """With room for two of the dispatches that it is asked."""
    bank, worker = Bank(), Worker()
    limits = wire.DispatchLimits(
        modality=Modality.TEXT,
        num_shards=4,
        dtype=torch.float32,
        max_tokens=64,
        max_queued=8,
        max_queued_bytes=2 * (1000 + answer_bytes(5, config.text.hidden_size, 2)),
        text=config.text,
    )
    answers = Answers(bank, worker, limits)  # type: ignore[arg-type]  # stand-ins
    return Desk(config, answers, bank, worker, Caller())


def test_what_is_in_hand_has_a_bound_in_bytes(desk: Desk) -> None:
    for _ in range(3):
        desk.ask(timeout_ns=2**62)
    assert desk.worker.num_jobs == 2
    assert desk.caller.codes == [code_pb2.RESOURCE_EXHAUSTED]
    desk.worker.run()
    desk.ask(timeout_ns=2**62)
    assert desk.caller.codes[-1] == code_pb2.RESOURCE_EXHAUSTED, "an answer is not written yet"
    desk.answers.gone(desk.caller.answers[1][1])
    desk.ask(timeout_ns=2**62)
    assert desk.worker.num_jobs == 2
    desk.caller.is_gone = True
    desk.worker.run()
    desk.worker.run()
    desk.ask(num_bytes=1 << 40)
    assert desk.worker.num_jobs == 1, "what is alone fits"


def test_an_envelope_that_is_wrong_takes_no_room(desk: Desk) -> None:
    desk.ask(shards=[7])
    assert desk.caller.codes == [code_pb2.INVALID_ARGUMENT]
    assert desk.worker.num_jobs == 0


def raises(error: Exception) -> Callable[[int], None]:
    def act(shard: int) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("before", "code"),
    [
        (lambda _: torch.empty(1 << 50), code_pb2.RESOURCE_EXHAUSTED),
        (raises(MemoryError()), code_pb2.RESOURCE_EXHAUSTED),
        (raises(torch.OutOfMemoryError("CUDA out of memory")), code_pb2.RESOURCE_EXHAUSTED),
        (raises(torch.AcceleratorError("CUDA error: out of memory")), code_pb2.RESOURCE_EXHAUSTED),
        (raises(RuntimeError("a defect")), code_pb2.INTERNAL),
    ],
    ids=["host", "python", "gpu", "driver", "defect"],
)
def test_without_memory_others_may_be_asked(
    desk: Desk, before: Callable[[int], object], code: int
) -> None:
    desk.bank.before = before
    desk.ask(timeout_ns=2**62)
    desk.worker.run()
    assert desk.caller.codes == [code]
    assert not desk.answers.loads.to_proto(), "what failed has done nothing for its shards"
    assert desk.worker.pulse.stalled_s() == 0


def test_a_server_whose_device_is_lost_is_not_alive_and_others_are_asked(desk: Desk) -> None:
    desk.bank.before = raises(torch.AcceleratorError("CUDA error: an illegal memory access"))
    desk.ask(timeout_ns=2**62)
    desk.worker.run()
    assert desk.caller.codes == [code_pb2.UNAVAILABLE]
    desk.worker.pulse.rest()
    assert desk.worker.pulse.stalled_s() == math.inf


def test_dispatches_that_come_too_late_are_load_all_the_same(desk: Desk) -> None:
    now = time.monotonic_ns()
    desk.ask(timeout_ns=1, received_ns=now - 10**9)
    desk.ask(timeout_ns=1, received_ns=now - 10**9)
    desk.worker.run()
    assert desk.caller.codes == [code_pb2.DEADLINE_EXCEEDED]
    desk.caller.is_gone = True
    desk.worker.run()
    load = desk.answers.loads.report(queued=0)
    assert load.dispatches_total == 2
    assert load.queue_s_total >= 2


def test_a_caller_that_goes_is_not_computed_for_any_further(desk: Desk) -> None:
    computed = []

    def before(shard: int) -> None:
        computed.append(shard)
        desk.caller.is_gone = True

    desk.bank.before = before
    desk.ask(timeout_ns=2**62)
    desk.worker.run()
    assert computed == [1]


async def test_a_stream_that_ends_gives_back_what_it_holds() -> None:
    class Room:
        held = 30

        def gone(self, held: int) -> None:
            self.held -= held

    room = Room()
    stream = _Stream(room)  # type: ignore[arg-type]  # a stand-in
    for held in (5, 10):
        stream.answer(experts_pb2.DispatchResponse(), held)
    await asyncio.sleep(0)
    assert room.held == 30
    stream.close()
    assert room.held == 15
    stream.answer(experts_pb2.DispatchResponse(), 15)
    await asyncio.sleep(0)
    assert room.held == 0
