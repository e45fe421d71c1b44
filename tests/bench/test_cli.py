"""`chiasm bench serve` as a person runs it: with flags that cannot be, and on a small system."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.stack import up
from typer.testing import CliRunner

from chiasm.cli import app

COMMAND = [sys.executable, "-m", "chiasm", "bench", "serve"]
START_TIMEOUT_S = 30.0


def _run(*flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, timeout=60, check=False, cwd=cwd
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--input-len", "many"], "--input-len"),
        (["--rate", "1", "--concurrency", "1"], "--rate"),
        (["--trace", "nowhere.jsonl"], "--trace"),
        (["--json", "/nowhere/at/all.json"], "--json"),
        (["--bogus", "1"], "--bogus"),
    ],
)
def test_errors_are_one_line(flags: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *flags])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def test_against_a_small_system(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with up(tiny_checkpoint) as client:
        endpoint = client._endpoint
        common = ["--endpoint", endpoint, "--output-len", "6", "--image-size", "56x56"]
        done = _run(
            *common, "--rate", "30", "--num-requests", "12", "--input-len", "uniform:5,20",
            "--image-share", "0.5", "--prefix-groups", "2", "--prefix-tokens", "8", "--turns", "2",
            "--slo", "ttft=60000,e2e=60000", "--json", "r.json", "--records", "r.jsonl",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "12 of 12" in done.stdout
        _check(json.loads((tmp_path / "r.json").read_text()), tmp_path / "r.jsonl")
        chat = _run(*common, "--prompt", "chat", "--num-requests", "3", "--image-share", "1")
        assert "3 of 3" in chat.stdout
        _interrupted(
            *common, "--duration", "60", "--json", str(tmp_path / "i.json"),
            records=tmp_path / "i.jsonl",
        )  # fmt: skip
    document = json.loads((tmp_path / "i.json").read_text())
    assert document["is_interrupted"]
    assert document["runs"][0]["succeeded"] > 0
    assert document["runs"][0]["failed"] == {"INTERRUPTED": 1}


def _check(document: dict[str, Any], records: Path) -> None:
    assert document["schema"] == 1
    assert set(document) >= {"machine", "versions", "settings", "seed", "servers", "runs"}
    (run,) = document["runs"]
    assert (run["requests"], run["succeeded"], run["failed"]) == (12, 12, {})
    assert run["output_tokens"] == 12 * 6
    assert run["goodput_share"] == 1.0
    assert run["latency_ms"]["itl"]["count"] == 12 * 5
    assert run["latency_ms"]["ttft"]["p50"] <= run["latency_ms"]["e2e"]["p50"]
    assert run["server_ms"]["prefill"]["count"] == 12
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(lines) == 12
    assert run["input_tokens"] == sum(line["input_tokens"] for line in lines)
    for line in lines:
        if line["turn"] == 0:
            # 56 x 56 pixels are four tokens, between a start and an end.
            extra = line["input_tokens"] - 6 * line["images"]
            assert 8 + 5 <= extra <= 8 + 20
        assert len(line["itl_ms"]) == 5
    assert {line["images"] for line in lines} == {0, 1}


def _interrupted(*flags: str, records: Path) -> None:
    """Ctrl-C when there is a first record: exit status 130 and a table."""
    process = subprocess.Popen(
        [*COMMAND, *flags, "--records", str(records)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    end = time.monotonic() + START_TIMEOUT_S
    while not (records.exists() and records.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "so far" in out
