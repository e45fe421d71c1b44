"""Copies of a checkpoint have its name, others have not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiasm.model.identity import digest
from chiasm.model.synth import PRESETS, synthesize

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "int4": {"experts": "int4"},
    "tcq2": {"experts": "tcq2"},
    "int8 dense": {"dense": "int8"},
}


@pytest.mark.parametrize("shard_bytes", [1 << 20, 1 << 40])
def test_copies_are_the_same_and_others_are_not(tmp_path: Path, shard_bytes: int) -> None:
    preset = replace(PRESETS["tiny"], shard_bytes=shard_bytes)
    for name, kind in KINDS.items():
        synthesize(tmp_path / name, preset=preset, **kind)
    found = {name: digest(tmp_path / name) for name in KINDS}
    assert len({*found.values()}) == len(KINDS)
    shutil.copytree(tmp_path / "int4", tmp_path / "copy")
    assert digest(tmp_path / "copy") == found["int4"]


def test_the_same_model_with_other_weights_is_another(tmp_path: Path) -> None:
    for seed in range(2):
        synthesize(tmp_path / str(seed), seed=seed)
    assert digest(tmp_path / "0") != digest(tmp_path / "1")
