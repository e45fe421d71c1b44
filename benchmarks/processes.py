"""What the processes of a running stack have used and counted."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from chiasm.local import LocalStack
from chiasm.membership import Role

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(stack: LocalStack, names: Iterable[str] | None = None) -> float:
    """Processor time of all processes, or of those named, since their start. Unlike wall time it
    hardly depends on what else the machine does."""
    pids = [stack.children[name].pid for name in (stack.children if names is None else names)]
    return sum(map(_ticks, pids)) / _TICKS_PER_S


def decoder_metrics(stack: LocalStack) -> dict[str, float]:
    """What the decoder exports, by sample name with its labels."""
    (decoder,) = stack.topology().ready(Role.DECODER)
    with urllib.request.urlopen(f"http://{decoder.metrics_address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def _ticks(pid: int) -> int:
    # The name before the closing bracket may hold anything; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
