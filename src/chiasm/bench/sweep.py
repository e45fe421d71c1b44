"""Loads to measure at, and the order of runs: A B A B, so that a machine's drift hits all alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

MAX_POINTS = 64
MAX_CONCURRENCY = 65_536


class Point(NamedTuple):
    """A load: closed with a concurrency, open with a rate per second, or a trace's own times."""

    kind: Literal["concurrency", "rate", "recorded"]
    value: float

    def __str__(self) -> str:
        return self.kind if self.kind == "recorded" else f"{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One run of an experiment; `ordinal` counts all of them."""

    ordinal: int
    repeat: int
    point: Point
    endpoint: str


def parse(text: str) -> tuple[Point, ...]:
    """Reads `rate=0.5,1,2` or `concurrency=1,4,16`. Raises ValueError."""
    kind, _, values = text.partition("=")
    try:
        match kind:
            case "rate":
                points = tuple(Point("rate", float(v)) for v in values.split(","))
            case "concurrency":
                points = tuple(Point("concurrency", int(v)) for v in values.split(","))
            case _:
                raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is neither rate=0.5,1,2 nor concurrency=1,4,16") from None
    if len(points) > MAX_POINTS or not all(p.value > 0 for p in points):
        raise ValueError(f"{text!r}: at most {MAX_POINTS} numbers, all above 0")
    if kind == "concurrency" and any(p.value > MAX_CONCURRENCY for p in points):
        raise ValueError(f"{text!r}: concurrency must lie in 1..{MAX_CONCURRENCY}")
    return points


def slots(points: Sequence[Point], endpoints: Sequence[str], repeats: int) -> Iterator[Slot]:
    """All runs in order: the endpoints take turns at every load, and all of it is repeated."""
    ordinal = 0
    for repeat in range(repeats):
        for point in points:
            for endpoint in endpoints:
                yield Slot(ordinal=ordinal, repeat=repeat, point=point, endpoint=endpoint)
                ordinal += 1
