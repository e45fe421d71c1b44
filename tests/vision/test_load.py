"""Loading the encoder's modules from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from chiasm import errors
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.load import load_module
from chiasm.model.resampler import Resampler
from chiasm.model.synth import synthesize
from chiasm.model.vision import VisionTower


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "tiny"
    synthesize(path, preset="tiny", seed=3)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_is_the_checkpoint_tensor(directory: Path, dtype: torch.dtype) -> None:
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        modules = {
            "vision_model.": VisionTower(config.vision),
            "model.resampler_model.": Resampler(config.vision, config.text),
        }
    with Checkpoint(directory, config) as checkpoint:
        for prefix, module in modules.items():
            counts: list[int] = []
            load_module(module, checkpoint, prefix, dtype, on_parameter=counts.append)
            parameters = dict(module.named_parameters())
            assert sum(counts) == sum(p.numel() for p in parameters.values())
            for name, parameter in parameters.items():
                assert parameter.dtype == dtype
                assert not parameter.requires_grad
                assert torch.equal(parameter, checkpoint.get(prefix + name).to(dtype)), name


class Norms(nn.Module):
    """Keeps one of its two parameters in float32."""

    fp32_parameters = ("norm1.bias",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)


def test_named_parameters_stay_float32(directory: Path) -> None:
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        module = Norms(config.vision.hidden_size)
    with Checkpoint(directory, config) as checkpoint:
        load_module(module, checkpoint, "vision_model.blocks.1.", torch.bfloat16)
    assert (module.norm1.weight.dtype, module.norm1.bias.dtype) == (torch.bfloat16, torch.float32)


def test_missing_and_misshapen_tensors_are_named(directory: Path) -> None:
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        wrong, missing = nn.Linear(3, 5), nn.ModuleDict({"nothing": nn.Linear(2, 2)})
    with Checkpoint(directory, config) as checkpoint:
        with pytest.raises(errors.InvalidArgument, match=r"blocks\.0\.attn\.proj\.weight"):
            load_module(wrong, checkpoint, "vision_model.blocks.0.attn.proj.", torch.float32)
        with pytest.raises(errors.NotFound, match="nothing"):
            load_module(missing, checkpoint, "vision_model.", torch.float32)
