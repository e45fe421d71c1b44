"""`chiasm convert` and its two folders: who may write, and what is not taken along."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint.test_convert import convert

from chiasm.alone import LOCK, alone
from chiasm.convert import stream
from chiasm.convert.plan import Options
from chiasm.errors import FailedPrecondition


def test_a_folder_is_locked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, unlink = tmp_path / LOCK, fcntl.flock, Path.unlink

    def ends_just_now(*args: Any) -> None:
        unlink(lock)  # as the process does that had it locked when this one opened it
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", ends_just_now)
    with pytest.raises(FailedPrecondition), alone(tmp_path, "writing to"):
        pass
    monkeypatch.setattr(fcntl, "flock", flock)

    def try_to_lock(path: Path, missing_ok: bool = False) -> None:
        with path.open() as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", try_to_lock)
    with alone(tmp_path, "writing to"):
        assert lock.exists()
    assert not lock.exists()


def test_what_belongs_to_the_source_alone_stays_there(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, source)
    strange = ("pytorch_model.bin", "model_state.pdparams", stream.REPORT)
    for name in (*strange, "LICENSE"):
        (source / name).write_text("of the source")
    written = convert(source, tmp_path / "out", Options(vision_experts="int8"))
    assert not any((tmp_path / "out" / name).exists() for name in strange)
    assert (tmp_path / "out" / "LICENSE").read_text() == "of the source"
    assert written.files.keys().isdisjoint(strange)
