"""Whoever writes it, on whatever thread: every line of a process has the same form."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import asyncio, gc, logging, threading, warnings
import structlog
from chiasm.telemetry import logs

logs.configure("gateway", level="{level}")
log = structlog.get_logger()
log.info("quiet")
structlog.contextvars.bind_contextvars(request_id="r1")
log.warning("ours", answer=42)
logging.getLogger("grpc._cython").error("theirs %d", 7)
logging.getLogger("grpc._cython").info("chatter")
warnings.warn("old", DeprecationWarning, stacklevel=1)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("lib").exception("failed")
thread = threading.Thread(target=lambda: log.warning("threaded"))
thread.start()
thread.join()

async def main():
    async def lost():
        raise ValueError("nobody asks")
    task = asyncio.create_task(lost())
    await asyncio.sleep(0)
    del task
    gc.collect()

asyncio.run(main())
"""


def lines(level: str) -> list[dict[str, object]]:
    command = [sys.executable, "-W", "always", "-c", PROGRAM.format(level=level)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_all_lines_are_alike() -> None:
    found = {str(line["event"]).splitlines()[0]: line for line in lines("info")}
    assert "chatter" not in found
    assert found["quiet"]["level"] == "info"
    for line in found.values():
        assert line["service"] == "gateway"
        assert line["timestamp"]
    assert found["ours"]["answer"] == 42
    assert found["theirs 7"]["logger"] == "grpc._cython"
    assert found["theirs 7"]["level"] == "error"
    for event in ("ours", "theirs 7", "failed"):
        assert found[event]["request_id"] == "r1"
    assert "ZeroDivisionError" in str(found["failed"]["exception"])
    assert "request_id" not in found["threaded"]
    lost = found["Task exception was never retrieved"]
    assert lost["logger"] == "asyncio"
    assert "nobody asks" in str(lost["exception"])
    assert any("DeprecationWarning" in event for event in found)


def test_the_level_holds_for_all() -> None:
    levels = {line["level"] for line in lines("error")}
    assert levels == {"error"}
