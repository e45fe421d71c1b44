"""What long work says of itself where nobody watches a bar."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from chiasm.telemetry import progress

TOTAL = 1000


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 500.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(clock: Clock, pieces: list[tuple[float, int]]) -> list[dict[str, Any]]:
    """What is logged when each piece, (seconds, bytes), takes so long."""
    with capture_logs() as logs, progress.writing("converting", TOTAL) as advance:
        for seconds, amount in pieces:
            clock.now += seconds
            advance(amount)
    return [dict(entry) for entry in logs]


def test_a_line_every_half_minute_and_one_at_the_end(clock: Clock) -> None:
    found = lines(clock, [(10.0, 50)] * 20)
    assert [entry["event"] for entry in found] == ["writing"] * 6 + ["written"]
    assert [entry["num_bytes"] for entry in found[:-1]] == [150, 300, 450, 600, 750, 900]
    assert [entry["remaining_s"] for entry in found[:-1]] == [170, 140, 110, 80, 50, 20]
    assert all(entry["of"] == TOTAL and entry["what"] == "converting" for entry in found[:-1])
    assert found[-1]["seconds"] == 200


def test_short_work_says_that_it_is_done(clock: Clock) -> None:
    assert [entry["event"] for entry in lines(clock, [(1.0, 500), (28.0, 500)])] == ["written"]


def test_the_pace_is_that_since_the_last_line(clock: Clock) -> None:
    """What an earlier run has done takes no time; from the second line on it counts no more."""
    found = lines(clock, [(0.0, 700), (40.0, 100), (40.0, 20), (31.0, 0), (9.0, 20)])
    assert [(entry["num_bytes"], entry["remaining_s"]) for entry in found[:-1]] == [
        (800, 10),
        (820, 360),
        (840, 320),
    ]
