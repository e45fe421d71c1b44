"""`chiasm convert` and its two folders: who may write, and what is not taken along."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from chiasm.convert import stream
from chiasm.errors import FailedPrecondition


def test_a_folder_is_locked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, unlink = tmp_path / stream._LOCK, fcntl.flock, Path.unlink

    def ends_just_now(*args: Any) -> None:
        unlink(lock)  # as the process does that had it locked when this one opened it
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", ends_just_now)
    with pytest.raises(FailedPrecondition), stream._alone(tmp_path):
        pass
    monkeypatch.setattr(fcntl, "flock", flock)

    def try_to_lock(path: Path, missing_ok: bool = False) -> None:
        with path.open() as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", try_to_lock)
    with stream._alone(tmp_path):
        assert lock.exists()
    assert not lock.exists()
