"""Files that are damaged, missing, unsafe or of another model; memory and progress."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from chiasm.errors import ChiasmError, DataLoss, InvalidArgument, NotFound
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.synth import PRESETS, synthesize

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def open_checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(directory, ModelConfig.load(directory))


def file_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / INDEX).read_text())
    return directory / str(index["weight_map"][name])


def test_tensors_outlive_the_files(copy: Path) -> None:
    with open_checkpoint(copy) as checkpoint:
        tensor = checkpoint.get(NORM)
        kept = tensor.clone()
        file = file_of(copy, NORM)
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
        assert torch.equal(tensor, kept)
    assert torch.equal(tensor, kept)


def test_bytes_are_counted_as_they_are_read(tiny_checkpoint: Path) -> None:
    with Checkpoint(tiny_checkpoint, ModelConfig.load(tiny_checkpoint)) as checkpoint:
        read = [checkpoint.get(NORM), checkpoint.get("vision_model.ln.bias")]
        assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in read)


def test_a_single_file_needs_no_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = dataclasses.replace(PRESETS["tiny"], shard_bytes=1 << 30)
    synthesize(tmp_path / "single", preset=whole)
    assert not (tmp_path / "single" / INDEX).exists()
    with open_checkpoint(tmp_path / "single") as one, open_checkpoint(tiny_checkpoint) as many:
        assert torch.equal(one.get(NORM), many.get(NORM))


def test_a_truncated_file(copy: Path) -> None:
    file = file_of(copy, NORM)
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(DataLoss, match=file.name):
            open_checkpoint(copy).get(NORM)


def test_a_missing_file_matters_only_when_asked_for(copy: Path) -> None:
    file = file_of(copy, "vision_model.ln.weight")
    file.unlink()
    checkpoint = open_checkpoint(copy)
    checkpoint.get("model.embed_tokens.weight")
    with pytest.raises(NotFound, match=file.name):
        checkpoint.get("vision_model.ln.weight")


def test_an_index_that_promises_too_much(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    other = file_of(copy, "vision_model.ln.weight").name
    assert other != index["weight_map"][NORM]
    index["weight_map"][NORM] = other
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(NotFound, match=rf"{other}.*{NORM}"):
        open_checkpoint(copy).get(NORM)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "", "..", 3, "a/b.safetensors"]
)
def test_an_index_must_stay_in_its_directory(copy: Path, file: object) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    with pytest.raises(InvalidArgument, match="not a file name"):
        open_checkpoint(copy)


def test_pickle_files_are_refused(copy: Path) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))
    with pytest.raises(InvalidArgument, match=r"pytorch_model\.bin.*pickle"):
        open_checkpoint(copy)
    for file in [copy / INDEX, *copy.glob("*.safetensors")]:
        file.unlink()
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        open_checkpoint(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="pickle"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("vocab_size", 640, "model.embed_tokens.weight"),
        ("intermediate_size", 512, "model.layers.0.mlp.up_proj.weight"),
        ("moe_num_experts", [8, 8], "model.layers.2.mlp.gate.weight_1"),
        ("moe_intermediate_size", [32, 32], "model.layers.1.mlp.experts.0.down_proj.weight"),
    ],
)
def test_shapes_that_config_does_not_expect(copy: Path, key: str, value: object, name: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InvalidArgument, match=r"shape"):
        open_checkpoint(copy).get(name)


def test_a_stack_of_other_experts_is_not_cut(converted: Path, tmp_path: Path) -> None:
    """A stack or fused tensor must match as a whole, not only where it is cut."""
    spoilt = Path(shutil.copytree(converted, tmp_path / "spoilt"))
    config = json.loads((spoilt / "config.json").read_text())
    text = config.get("text_config", config)
    text["moe_intermediate_size"] = [48, 32]
    (spoilt / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=r"shape"):
        open_checkpoint(spoilt).get("model.layers.1.mlp.experts.0.gate_proj.weight")


def test_the_callers_shape(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert checkpoint.get(NORM, shape=(128,)).shape == (128,)
    with pytest.raises(ChiasmError, match=r"\[128\].*\[64\]"):
        checkpoint.get(NORM, shape=(64,))
