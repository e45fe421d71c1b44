"""Waiting for real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from chiasm.child import Child
from chiasm.transport.membership import TopologyWatcher

WAIT_S = 20.0

Spawn = Callable[..., Child]
Watch = Callable[[str], TopologyWatcher]


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Polls until the condition holds; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true in {WAIT_S} s"
        time.sleep(0.02)


def address(child: Child) -> str:
    """Where a child listens, once it does."""
    wait_until(lambda: child.address() or child.exit_code is not None, f"{child.name} listens")
    found = child.address()
    assert found is not None, "\n".join(child.last_lines())
    return found


def is_running(pid: int) -> bool:
    """Whether a process that need not be a child of ours lives; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
