"""Low-precision checkpoints that `chiasm convert` did not write, and what config.json says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.banks import bank, matrices, wide
from checkpoint.converters import to_paddle
from quant import wint2_files
from safetensors.torch import load_file

from chiasm.errors import InvalidArgument
from chiasm.kernels.quant import int8
from chiasm.kernels.quant.wint2 import Wint2Matrices
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.expert_weights import DOWN, GATE_UP, Bank
from chiasm.model.quantization import KEY, ExpertFormat
from chiasm.model.stream import tensor_bytes
from chiasm.model.synth import PRESETS, synthesize
from chiasm.model.synth_tokenizer import train
from chiasm.model.writer import write_description
from chiasm.types import Modality

TEXT = Modality.TEXT
LAST = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "only 1 is supported"),
        ({"experts": {"text": [{"layer": 9, "precision": "int8"}]}}, r"integer in 0\.\.3"),
        ({"experts": {"text": [{"layer": 1, "precision": "int3"}]}}, "none of int8"),
        ({"experts": {"vision": {}}}, "must be a list"),
        ({"experts": {}, "dense": "int2"}, "none of stored, int8"),
    ],
)
def test_blocks_that_cannot_be_read(
    tiny_checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = json.loads((tiny_checkpoint / "config.json").read_text())
    values["chiasm_quantization"] = {"version": 1, "experts": {}, **change}
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InvalidArgument, match=f"chiasm_quantization.*{message}"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("block", [{}, {"quant_method": "fp8"}, {"quantization": "wint4"}])
def test_other_quantisations_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, block: dict[str, Any]
) -> None:
    values = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": block}))
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    with pytest.raises(InvalidArgument, match=r"quantization_config.*only Baidu's wint2"):
        ModelConfig.load(tmp_path)


def wint2_paddle(directory: Path, *, num_layers: int, first_layer: int) -> Path:
    """A -Paddle checkpoint whose experts are WINT2 from a layer on."""
    synthesize(directory / "hub", preset=wide(num_layers=num_layers))
    to_paddle(directory / "hub", directory / "paddle")
    wint2_files.rewrite(directory / "paddle", first_layer=first_layer)
    return directory / "paddle"


def test_wint2_layers_are_read_and_the_others_as_they_are(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    paddle = wint2_paddle(tmp_path, num_layers=4, first_layer=2)
    config = ModelConfig.load(paddle)
    assert [config.quantization.of(layer, TEXT).precision for layer in (1, 2, 3)] == [
        "stored",
        "wint2",
        "wint2",
    ]
    found = bank(paddle, TEXT, num_shards=4, shard=1)
    assert found.precision == "float32+wint2"
    gate_up, down = matrices(found, LAST)
    assert isinstance(gate_up, Wint2Matrices)
    assert (gate_up.num_experts, gate_up.shape, down.shape) == (4, (256, 128), (128, 128))
    stored = load_file(paddle / "model.safetensors")
    prefix = "ernie.layers.3.mlp.experts.5.up_gate_proj."
    assert torch.equal(gate_up.codes[1].t(), stored[f"{prefix}quant_weight"])
    assert torch.equal(gate_up.super_scale[1], stored[f"{prefix}super_scales"])
    to_paddle(tiny_checkpoint, tmp_path / "narrow")
    wint2_files.rewrite(tmp_path / "narrow", first_layer=1)
    with pytest.raises(InvalidArgument, match="wint2 takes a multiple of 128 inputs, not 64"):
        bank(tmp_path / "narrow", TEXT)


@pytest.mark.parametrize("dense", [False, True])
def test_what_a_released_checkpoint_has_in_wint4_and_wint8_is_refused_by_name(
    tmp_path: Path, dense: bool
) -> None:
    paddle = wint2_paddle(tmp_path, num_layers=5, first_layer=3)
    wint2_files.add_wint4_and_wint8(paddle, first_layer=3, dense=dense)
    config = ModelConfig.load(paddle)
    with pytest.raises(InvalidArgument) as refusal:
        Checkpoint(paddle, config)
    assert refusal.value.field == "config.json:quantization_config"
    found = re.search(r"layers (\S+) to (\S+) are in wint4 \((\S+)\)", str(refusal.value))
    assert found is not None
    assert found[1] == "1"
    assert found[2] == "2"
    assert re.fullmatch(r"ernie\.layers\.1\.mlp\.experts\.\d+\.\w+_proj\.quant_weight", found[3])
    assert ("layers 0 to 4 are in wint8 (ernie.layers.0." in str(refusal.value)) is dense


def test_rotation_that_does_not_fit_is_refused_when_it_is_read(
    tmp_path: Path,
) -> None:
    synthesize(tmp_path / "out", experts="tcq2")
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    for entry in values[KEY]["experts"]["text"]:
        entry["rotated"] = True
    file.write_text(json.dumps(values))
    with pytest.raises(InvalidArgument, match="rotated tcq2 takes a multiple of 128 inputs"):
        bank(tmp_path / "out", TEXT)


@pytest.mark.parametrize("precision", ["int8", "int4", "tcq2"])
def test_synthetic_experts_in_low_precision(precision: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "model", experts=precision, seed=3)
    for modality in Modality:
        found = bank(tmp_path / "model", modality)
        assert found.precision == precision
        gate_up, down = matrices(found, 2)
        for stack, gain in ((gate_up, 1.0), (down, 1.5)):
            weight = stack.dequantize(1, torch.float32)
            assert float(weight.std() * stack.shape[1] ** 0.5) == pytest.approx(gain, rel=0.1)
            assert abs(float(weight.mean() * stack.shape[1] ** 0.5)) < 0.1
    synthesize(tmp_path / "again", experts=precision, seed=3)
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("experts", ["stored", "tcq2"])
def test_synthetic_dense_weights_in_int8(experts: str, tmp_path: Path) -> None:
    """They are those of the same seed in full width, rounded."""
    synthesize(tmp_path / "model", experts=experts, dense="int8", seed=3)
    synthesize(tmp_path / "stored", experts=experts, seed=3)
    found, given = (
        {k: t for f in (tmp_path / name).glob("*.safetensors") for k, t in load_file(f).items()}
        for name in ("model", "stored")
    )
    for name in ("model.embed_tokens", "model.layers.2.mlp.shared_experts.down_proj"):
        coded = int8.encode(given[f"{name}.weight"][None])
        assert torch.equal(found[f"{name}.codes"], coded.codes[0])
        assert torch.equal(found[f"{name}.scale"], coded.scale[0])
        assert f"{name}.weight" not in found
    kept = [name for name in given if f"{name.removesuffix('.weight')}.codes" not in found]
    assert all(torch.equal(found[name], given[name]) for name in kept)
    config = ModelConfig.load(tmp_path / "model")
    assert config.quantization.dense == "int8"
    assert config.quantization.of(1, TEXT).precision == experts
    assert bank(tmp_path / "model", TEXT).precision == {"stored": "float32"}.get(experts, experts)
    with pytest.raises(InvalidArgument, match="dense: 'tcq2' is none of stored, int8"):
        synthesize(tmp_path / "wrong", dense="tcq2")


def test_the_published_geometry_in_low_precision(tmp_path: Path) -> None:
    """All experts in two bits are some 7 GB: summed over their tensors, none of which is made."""
    preset = PRESETS["ernie-4.5-vl-28b-a3b"]
    config = write_description(tmp_path, preset, train(preset.num_bpe_tokens), dtype="bfloat16")
    num_bytes = num_weights = 0
    for layer in config.text.moe_layers:
        for modality in Modality:
            held = Bank.to_encode(config, layer, modality, ExpertFormat("tcq2"))
            num_bytes += sum(tensor_bytes(*entry) for entry in held.layout().values())
            shapes = (held.shape(projection) for projection in (GATE_UP, DOWN))
            num_weights += config.text.num_experts * sum(n * k for n, k in shapes)
    assert 27.1e9 < num_weights < 27.3e9
    assert 7.0e9 < num_bytes < 7.2e9
    assert 2.08 <= 8 * num_bytes / num_weights <= 2.13
