"""What the processes of a running stack have used and counted."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from chiasm.local import LocalStack

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(stack: LocalStack, names: Iterable[str] | None = None) -> float:
    """Processor time of all processes, or of those named, since their start. Unlike wall time it
    hardly depends on what else the machine does."""
    pids = [stack.children[name].pid for name in (stack.children if names is None else names)]
    return sum(map(_ticks, pids)) / _TICKS_PER_S


def exported(stack: LocalStack, name: str) -> dict[str, float]:
    """What a process exports, by sample name with its labels."""
    address = stack.children[name].address()
    (member,) = (m for m in stack.topology().members if m.address == address)
    with urllib.request.urlopen(f"http://{member.metrics_address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def memory(stack: LocalStack) -> dict[str, dict[str, int]]:
    """Bytes by process: `own`, that no file backs, what forks share counted whole; `resident`,
    with its share of files that are mapped and of what forks share; `peak`, the most that was
    resident at any time, shared pages counted whole."""
    return {name: _memory(child.pid) for name, child in stack.children.items()}


def _memory(pid: int) -> dict[str, int]:
    smaps = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
    peak = _kilobytes(Path(f"/proc/{pid}/status"))["VmHWM"]
    return {"own": smaps["Anonymous"], "resident": smaps["Pss"], "peak": peak}


def _kilobytes(file: Path) -> dict[str, int]:
    """Lines `name: N kB`, in bytes."""
    lines = (line.split() for line in file.read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in lines}


def _ticks(pid: int) -> int:
    # The name before the closing bracket may hold anything; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
