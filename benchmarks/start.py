"""How soon `chiasm up` is ready and what memory its services take: as forks, and as programs.

The bundled model. The first start of a launcher that forks waits for its fork server's imports;
later ones, as those of replicas, do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from benchmarks.processes import memory
from chiasm import bundled, forkserver
from chiasm.local import LocalStack, StackConfig

REPEATS = 3


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Seconds until ready, and bytes of all services together, in turns."""
    seconds: dict[str, list[float]] = {}
    held: dict[str, list[int]] = {}
    for turn in range(REPEATS + 1):
        for way in ("programs", "forks"):
            name = "first forks" if way == "forks" and not turn else way
            took, resident = _start(fork=way == "forks")
            seconds.setdefault(name, []).append(took)
            held.setdefault(name, []).append(resident)
    for name, taken in seconds.items():
        report(
            f"{name}: ready after {min(taken):.1f} to {max(taken):.1f} s, median "
            f"{statistics.median(taken):.1f}; {statistics.median(held[name]) / 1e6:.0f} MB"
        )
    return {"seconds": seconds, "resident_bytes": held}


def _start(*, fork: bool) -> tuple[float, int]:
    with ExitStack() as until_end:
        if not fork:
            until_end.enter_context(patch.object(forkserver, "fork", lambda *_, **__: None))
        start = time.perf_counter()
        stack = until_end.enter_context(LocalStack(StackConfig(model=bundled.CHECKPOINT)))
        took = time.perf_counter() - start
        return took, sum(of["resident"] for of in memory(stack).values())
