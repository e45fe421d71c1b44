"""Which tests run one after the other when there are several workers (`pytest -n 2`).

A module's tests share fixtures, and so do those of some modules; each group goes to one worker.
What goes by the clock, processes that are killed, slowed down and waited for, is one of them, and
has the processor when it wants it: workers that are at anything else stand back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent

BY_THE_CLOCK = "by the clock"
OTHERS_NICENESS = 10

_TOGETHER = {
    BY_THE_CLOCK: (
        "control",
        "e2e/test_endings.py",
        "e2e/test_failures.py",
        "e2e/test_failures_experts.py",
        "e2e/test_failures_network.py",
        "e2e/test_resume.py",
        "e2e/test_scaling.py",
        "e2e/test_two_decoders.py",
        "kube",  # one control plane, whose addresses are fixed
    ),
    "checkpoint": ("checkpoint",),  # one converted model for all
    "model": ("model",),  # one reference model for all
    "training": ("training",),
    "served": ("e2e/test_bad_input.py", "e2e/test_cli.py"),
    "observed": ("e2e/test_dashboards.py", "e2e/test_observability.py"),
}


def group(path: Path) -> str:
    """The group of a test's module: one of _TOGETHER, or a group of its own."""
    place = path.relative_to(ROOT)
    for name, places in _TOGETHER.items():
        if any(place.is_relative_to(each) for each in places):
            return name
    return str(place)


class ByGroup(LoadScopeScheduling):
    """Deals groups to workers. The marks of `--dist loadgroup` stand in what pytest 9.2 makes anew,
    and are lost."""

    def _split_scope(self, nodeid: str) -> str:
        return group(ROOT.parent / nodeid.partition("::")[0])


def worker(config: pytest.Config) -> str:
    """The name of this worker, as `gw0`; nothing when there are none."""
    return str(getattr(config, "workerinput", {}).get("workerid", ""))
