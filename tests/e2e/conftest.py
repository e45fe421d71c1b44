"""One stack, as `chiasm up` starts it, for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e.cli import up
from e2e.cluster import defects


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running stack: its gateway's address and its checkpoint."""

    endpoint: str
    model: Path


@pytest.fixture(scope="session")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two text servers, one vision server, float32; must end with 0 and without a defect."""
    logs = tmp_path_factory.mktemp("served")
    flags = ["--dtype", "float32", "--text-servers", "2", "--log-dir", logs]
    with up(tiny_checkpoint, *flags) as stack:
        assert stack.line.startswith("ready "), stack.stderr[-4000:]
        yield Served(endpoint=stack.endpoint, model=tiny_checkpoint)
        assert stack.end() == 0
        assert stack.process.stdout is not None
        assert stack.process.stdout.read() == ""
    assert defects(logs) == []
