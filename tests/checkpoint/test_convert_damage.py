"""`chiasm convert` and damage: of the source, and of what an earlier run has written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from checkpoint.test_convert import convert
from safetensors.torch import load_file, save_file

from chiasm.convert.plan import Options
from chiasm.errors import DataLoss, NotFound
from chiasm.model import manifest
from chiasm.model.manifest import Manifest


def test_a_file_that_is_damaged_is_written_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_checkpoint, out)
    file = out / "experts-002-vision.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        convert(tiny_checkpoint, out)
        assert file.read_bytes() == content


def test_the_manifest_has_the_files_that_are_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = convert(tiny_checkpoint, tmp_path).files
    assert files == Manifest.load(tmp_path).files
    assert "tokenizer_config.json" in files
    for file in tiny_checkpoint.iterdir():
        if file.name in files:
            assert files[file.name].sha256 == manifest.sha256(tmp_path / file.name)


def test_a_source_that_is_cut_short_or_not_whole_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, source)
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataLoss) as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason == "CHECKPOINT_CORRUPT"
    file.unlink()
    with pytest.raises(NotFound) as missing:
        convert(source, tmp_path / "out")
    assert missing.value.reason == "FILE_NOT_FOUND"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (Options(text_experts="int4"), "model.layers.2.mlp.experts.0.up_proj.weight", math.nan),
        (Options(dense="int8"), "model.layers.2.self_attn.q_proj.weight", math.inf),
    ],
    ids=["int4", "int8"],
)
def test_weights_that_are_no_numbers_are_not_converted(
    tiny_checkpoint: Path, tmp_path: Path, options: Options, name: str, value: float
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, source)
    (file,) = (f for f in source.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][0, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataLoss, match=name.rpartition(".")[0].removesuffix(".up_proj")) as refused:
        convert(source, tmp_path / "out", options)
    assert refused.value.reason == "CHECKPOINT_CORRUPT"
