"""Decisions with all they were made from, in a file, and what they would be today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Decision, Pool, PoolConfig, Signals

MAX_BYTES = 64 << 20
"""A file that has grown so large becomes FILE.1, in place of an older one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line. The first one of each life of an orchestrator has the configuration, all others have
    signals and the decision."""

    configs: Mapping[Pool, PoolConfig] | None = None
    signals: Signals | None = None
    decision: Decision | None = None


_ENTRY = TypeAdapter(Entry)


class Journal:
    """Appends to a file; raises OSError."""

    def __init__(self, path: Path, configs: Mapping[Pool, PoolConfig]) -> None:
        self._path, self._configs = path, configs
        self._write(Entry(configs=configs))

    def add(self, signals: Signals, decision: Decision) -> None:
        """Books one decision."""
        if self._path.stat().st_size > MAX_BYTES:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._write(Entry(configs=self._configs))
        self._write(Entry(signals=signals, decision=decision))

    def _write(self, entry: Entry) -> None:
        with self._path.open("ab") as file:
            file.write(_ENTRY.dump_json(entry, exclude_none=True) + b"\n")


def replay(path: Path) -> Iterator[tuple[Decision, Decision]]:
    """Each decision as it was made, and as it is made now from the same signals.

    Raises ValueError for a file that is none.
    """
    planner: Planner | None = None
    with path.open("rb") as file:
        for line in file:
            entry = _ENTRY.validate_json(line)
            if entry.configs is not None:
                planner = Planner(entry.configs)
            if entry.signals is None or entry.decision is None:
                continue
            if planner is None:
                raise ValueError(f"{path} does not begin with a configuration")
            yield entry.decision, planner.step(entry.signals)
