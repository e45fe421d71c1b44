"""`chiasm convert` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiasm.cli import app
from chiasm.convert import report


def test_the_report_is_written_before_it_is_printed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", list[dict[str, object]]()
    file = out / "chiasm_conversion.json"
    monkeypatch.setattr(report, "table", lambda _: seen.append(json.loads(file.read_text())) or "")
    flags = ["--model", str(tiny_checkpoint), "--out", str(out), "--text-experts", "int8"]
    done = CliRunner().invoke(app, ["convert", *flags])
    assert done.exit_code == 0, done.output
    (document,) = seen
    assert document["layers"]
