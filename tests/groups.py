"""Which tests run one after the other when there are several workers (`pytest -n 2`).

A module's tests share fixtures, and so do those of some modules; each group goes to one worker.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent

_TOGETHER = {
    "checkpoint": ("checkpoint",),  # one converted model for all
    "model": ("model",),  # one reference model for all
    "training": ("training",),
    "served": ("e2e/test_bad_input.py", "e2e/test_cli.py"),
    "observed": ("e2e/test_dashboards.py", "e2e/test_observability.py"),
    "kube": ("kube",),  # one control plane, whose addresses are fixed
}


def group(path: Path) -> str:
    """The group of a test's module: one of _TOGETHER, or a group of its own."""
    place = path.relative_to(ROOT)
    for name, places in _TOGETHER.items():
        if any(place.is_relative_to(each) for each in places):
            return name
    return str(place)
