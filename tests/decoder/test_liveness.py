"""The pulse of the engine's loop: still at rest, running while a step is under way."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder.test_scheduler import scheduler, sequence

from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.pools import ExpertPools
from chiasm.services.decoder.sequence import FailedEvent
from chiasm.types import Modality

WAIT_S = 20.0
PARK_TIMEOUT_S = 0.5
STALL_S = 0.05


class Held:
    """A forward pass that waits for the test, and then fails."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError("there is no model")
        self.is_entered, self.may_go = threading.Event(), threading.Event()

    def run(self, _: object) -> None:
        self.is_entered.set()
        assert self.may_go.wait(WAIT_S)
        raise self.error


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def pool() -> Any:
    return SimpleNamespace(is_covered=True, tidy=lambda: None)


@pytest.fixture
def engine(held: Any, pool: Any) -> Iterator[Engine]:
    pools = ExpertPools(dict.fromkeys(Modality, pool), timeout_s=1)
    made = Engine(held, scheduler(8), pools, park_timeout_s=PARK_TIMEOUT_S)
    made.start()
    yield made
    held.may_go.set()
    made.close()


def test_a_step_that_does_not_end_stalls_the_engine(engine: Engine, held: Held) -> None:
    failed = threading.Event()
    assert engine.pulse.stalled_s() == 0
    asked = sequence(4, 2)
    asked.sink = lambda event: failed.set() if isinstance(event, FailedEvent) else None
    engine.submit(asked)
    assert held.is_entered.wait(WAIT_S)
    until(lambda: engine.pulse.stalled_s() > STALL_S)
    engine.submit(sequence(4, 2))
    assert engine.pulse.stalled_s() > STALL_S, "new work is no progress"
    held.may_go.set()
    assert failed.wait(WAIT_S)
    until(lambda: engine.pulse.stalled_s() == 0)


def test_an_engine_whose_device_is_lost_is_not_alive_any_more(engine: Engine, held: Held) -> None:
    held.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    held.may_go.set()
    failed = threading.Event()
    asked = sequence(4, 2)
    asked.sink = lambda event: failed.set() if isinstance(event, FailedEvent) else None
    engine.submit(asked)
    assert failed.wait(WAIT_S)
    assert engine.pulse.stalled_s() == math.inf


@pytest.mark.parametrize("has_work", [False, True])
def test_pools_see_to_what_arrives_while_nobody_asks_them(
    engine: Engine, pool: Any, has_work: bool
) -> None:
    """A server that comes and goes would leave lanes open until the next request for its pool."""
    if has_work:
        pool.is_covered = False
        engine.submit(sequence(4, 2))
    for _ in range(2):
        seen = threading.Event()
        pool.tidy = seen.set
        assert seen.wait(WAIT_S)
    assert has_work or engine.pulse.stalled_s() == 0


def test_requests_that_wait_for_a_pool_do_not_stall_it(engine: Engine, pool: Any) -> None:
    pool.is_covered = False
    failed = threading.Event()
    asked = sequence(4, 2)
    asked.sink = lambda event: failed.set() if isinstance(event, FailedEvent) else None
    begun = time.monotonic()
    engine.submit(asked)
    longest = 0.0
    while not failed.is_set():
        assert time.monotonic() < begun + WAIT_S
        longest = max(longest, engine.pulse.stalled_s())
        time.sleep(0.001)
    assert longest < time.monotonic() - begun, "the clock started anew while it waited"
    until(lambda: engine.pulse.stalled_s() == 0)
