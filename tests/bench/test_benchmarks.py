"""The repository's own measurements: what they make of their numbers and of failures."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are not part of the package

from benchmarks import __main__ as command
from benchmarks import documents, recovery, seam
from chiasm.client import Delta

Report = Callable[[str], None]


def test_the_seams_ratios_are_those_of_neighbours() -> None:
    speeds = {
        seam.INSIDE: {"prefill": [100.0, 50.0, 10.0]},
        seam.LANE: {"prefill": [80.0, 45.0, 5.0]},
    }
    ratios = seam.over_colocated(speeds)
    assert ratios == {seam.LANE: {"prefill": [0.8, 0.9, 0.5]}}
    (line,) = seam.lines(ratios)
    assert line == "shared memory / colocated: prefill 0.80 (0.50 to 0.90)"


def test_a_failed_case_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(model: Path, report: Report) -> dict[str, object]:
        raise ValueError("no such thing")

    def works(model: Path, report: Report) -> dict[str, object]:
        return {"seconds": 1}

    monkeypatch.setattr(command, "CASES", {"first": breaks, "second": works})
    monkeypatch.setattr(documents, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--model", "tiny"])
    with pytest.raises(SystemExit, match="failed: first"):
        command.main()
    assert "no such thing" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["second.json"]
    assert json.loads((tmp_path / "second.json").read_text())["result"] == {"seconds": 1}


def test_a_failure_that_cannot_be_caused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def answer(*_: object, **__: object) -> Iterator[Delta]:
        yield from (Delta(text="", token_ids=(i,)) for i in range(recovery.BEFORE + 1))
        assert tried.wait(10)
        yield Delta(text="", token_ids=(1,))

    def disturb() -> None:
        tried.set()
        raise ProcessLookupError("nobody is there to kill")

    client = nullcontext(SimpleNamespace(generate=answer))
    monkeypatch.setattr(recovery, "Client", lambda *_, **__: client)
    stack: Any = SimpleNamespace(endpoint="")
    with pytest.raises(ProcessLookupError):
        recovery._answer(stack, disturb)
