"""Files of weights that are written piece by piece: whole, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chiasm.errors import Internal
from chiasm.model.stream import SafetensorsStream

LAYOUT = {"a": (torch.float32, (3, 2)), "b": (torch.int8, (5,))}
A, B = torch.ones(3, 2), torch.arange(5, dtype=torch.int8)


def test_a_whole_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    with SafetensorsStream(tmp_path / "file", LAYOUT) as stream:
        stream.add("a", A)
        stream.add("b", B)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    found = load_file(tmp_path / "file")
    assert torch.equal(found["a"], A)
    assert torch.equal(found["b"], B)


def test_a_file_that_lacks_a_tensor_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(Internal, match="lacks b"),
        SafetensorsStream(tmp_path / "file", LAYOUT) as stream,
    ):
        stream.add("a", A)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["fsync", "header"])
def test_a_full_disk_leaves_nothing(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(SafetensorsStream, "_write", full)
    with (
        pytest.raises(OSError, match="No space"),
        SafetensorsStream(tmp_path / "file", {}) as stream,
    ):
        assert stream.num_bytes
    assert not list(tmp_path.iterdir())
