"""Every layout gives the same bits for every canonical name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.layouts import detect
from chiasm.model.shapes import tensor_shapes
from chiasm.types import Modality


def raw_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What the files of a hub-layout checkpoint hold, read without our code."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def test_hub_tensors_are_what_the_files_hold(hub: Path) -> None:
    config, expected = ModelConfig.load(hub), raw_tensors(hub)
    assert set(tensor_shapes(config)) == set(expected)
    with Checkpoint(hub, config) as checkpoint:
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.get(name), tensor), name
        assert checkpoint.bytes_read == sum(t.nbytes for t in expected.values())


def test_layouts_agree_on_every_tensor(hub: Path, converted: Path) -> None:
    expected = raw_tensors(hub)
    with Checkpoint(converted, ModelConfig.load(converted)) as checkpoint:
        for name, tensor in expected.items():
            assert checkpoint.has(name), name
            found = checkpoint.get(name, shape=tuple(tensor.shape))
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name
            assert found.is_contiguous(), name
            assert found.untyped_storage().nbytes() == found.nbytes, name


def test_layouts_agree_on_every_expert(hub: Path, converted: Path) -> None:
    config, stored = ModelConfig.load(hub), raw_tensors(hub)
    with Checkpoint(converted, ModelConfig.load(converted)) as checkpoint:
        for layer in config.text.moe_layers:
            for modality, offset in ((Modality.TEXT, 0), (Modality.VISION, 16)):
                width = config.text.expert_intermediate(modality)
                for expert in (0, 5, 15):
                    prefix = f"model.layers.{layer}.mlp.experts.{offset + expert}."
                    before = checkpoint.bytes_read
                    gate_up, down = checkpoint.expert(layer, modality, expert)
                    assert checkpoint.bytes_read - before == gate_up.nbytes + down.nbytes
                    assert gate_up.shape == (2 * width, config.text.hidden_size)
                    assert gate_up.untyped_storage().nbytes() == gate_up.nbytes
                    assert torch.equal(gate_up[:width], stored[f"{prefix}gate_proj.weight"])
                    assert torch.equal(gate_up[width:], stored[f"{prefix}up_proj.weight"])
                    assert torch.equal(down, stored[f"{prefix}down_proj.weight"])


def test_unknown_names(tiny_checkpoint: Path, converted: Path) -> None:
    for directory in (tiny_checkpoint, converted):
        with Checkpoint(directory, ModelConfig.load(directory)) as checkpoint:
            for name in (
                "lm_head.weight",  # tied
                "model.layers.0.mlp.gate.weight",  # layer 0 is dense
                "model.layers.1.mlp.experts.32.gate_proj.weight",
                "model.layers.1.mlp.experts.0.side_proj.weight",
                "model.layers.9.self_attn.q_proj.weight",
                "",
            ):
                assert not checkpoint.has(name), name
                with pytest.raises(NotFound):
                    checkpoint.get(name)
            with pytest.raises(InvalidArgument, match="expert"):
                checkpoint.expert(1, Modality.TEXT, 16)


def test_an_extra_head_is_ignored_when_tied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = raw_tensors(tiny_checkpoint)
    tensors["lm_head.weight"] = torch.zeros(576, 128)
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, ModelConfig.load(tiny_checkpoint)) as checkpoint:
        assert not checkpoint.has("lm_head.weight")
        assert checkpoint.has("model.embed_tokens.weight")


def test_orientation_is_told_without_vision_tensors(converted: Path, tmp_path: Path) -> None:
    """A text-only copy still shows whether its Linears are transposed."""
    kept = {
        name: tensor
        for name, tensor in raw_tensors(converted).items()
        if "vision_" not in name and "resampler" not in name
    }
    save_file(kept, tmp_path / "model.safetensors")
    config = ModelConfig.load(converted)
    name = "model.layers.0.mlp.down_proj.weight"
    with Checkpoint(converted, config) as full, Checkpoint(tmp_path, config) as part:
        assert torch.equal(part.get(name), full.get(name))
        assert not part.has("vision_model.ln.weight")
        with pytest.raises(NotFound, match=r"vision_model\.ln\.weight.*model\.safetensors"):
            part.get("vision_model.ln.weight")


def test_names_of_no_known_layout(tiny_checkpoint: Path) -> None:
    config = ModelConfig.load(tiny_checkpoint)
    with pytest.raises(InvalidArgument, match="layout"):
        detect(config, ["transformer.h.0.attn.weight"], lambda key: None)
