"""How many cores this process may use."""

from __future__ import annotations

import os


def usable() -> int:
    """Cores that the scheduler may give this process; all of the machine where it does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
