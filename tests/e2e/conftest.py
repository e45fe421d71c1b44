"""Stacks: those that tests only ask or observe, and one for each module that disturbs its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e.cli import up
from e2e.cluster import Cluster, defects
from e2e.disturbed import Peace, running_cluster
from e2e.observed import Observed, observing


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running stack: its gateway's address and its checkpoint."""

    endpoint: str
    model: Path


@pytest.fixture(scope="package")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two text servers, one vision server, float32; must end with 0 and without a defect."""
    logs = tmp_path_factory.mktemp("served")
    flags = ["--dtype", "float32", "--text-servers", "2", "--log-dir", str(logs)]
    with up(tiny_checkpoint, *flags) as stack:
        assert stack.line.startswith("ready "), stack.stderr[-4000:]
        yield Served(endpoint=stack.endpoint, model=tiny_checkpoint)
        assert stack.end() == 0
        assert stack.process.stdout is not None
        assert stack.process.stdout.read() == ""
    assert defects(logs) == []


@pytest.fixture(scope="package")
def observed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Observed]:
    """A stack that tells everything about itself."""
    with observing(tiny_checkpoint, tmp_path_factory.mktemp("observed")) as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Cluster]:
    """Two text servers, one vision server, to be disturbed; requests wait for a minute."""
    logs = tmp_path_factory.mktemp("logs")
    with running_cluster(tiny_checkpoint, logs, park_timeout_s=60, text_servers=2) as running:
        yield running


@pytest.fixture(scope="module")
def peace(stack: Cluster) -> Peace:
    """Answers to compare with."""
    return Peace(stack.endpoint)
