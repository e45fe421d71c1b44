"""Real processes for the control plane's tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from control.processes import Spawn, Watch

from chiasm.child import Child
from chiasm.transport.membership import TopologyWatcher


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts `python -m module flags...`; everything started is killed after the test."""
    children: list[Child] = []

    def start(module: str, *flags: str) -> Child:
        name = f"{len(children)}-{module}"
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        child = Child(name, module, flags, env=env, log_path=tmp_path / f"{name}.log")
        children.append(child)
        return child

    yield start
    for child in children:
        child.end(0.0)


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    """Starts a TopologyWatcher on an orchestrator's address."""
    watchers: list[TopologyWatcher] = []

    def start(orchestrator: str) -> TopologyWatcher:
        watchers.append(TopologyWatcher(orchestrator))
        watchers[-1].start()
        return watchers[-1]

    yield start
    for watcher in watchers:
        await watcher.close()
