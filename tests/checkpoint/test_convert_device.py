"""Matrices are encoded where `device` says; what is written does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_convert import RELATIVE_ERRORS, relative_errors
from safetensors.torch import load_file

from chiasm.convert import plan, stream
from chiasm.convert.encode import encode
from chiasm.convert.plan import Options
from chiasm.model.quantization import ExpertFormat
from chiasm.types import Modality

OPTIONS = Options(text_experts="int8", vision_experts="tcq2", first_layers=0, dense="int8")


def test_every_matrix_goes_to_the_device(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = set()

    def on_the_cpu(*args: Any, device: torch.device, **kwargs: Any) -> Any:
        devices.add(device)
        return encode(*args, **kwargs)

    monkeypatch.setattr(stream, "encode", on_the_cpu)
    device = torch.device("cuda:3")
    stream.run(plan.make(tiny_checkpoint, OPTIONS), tmp_path / "out", device=device)
    assert devices == {device}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "int4", "tcq2"])
def test_codes_come_back(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight, heed = torch.randn(40, 256, generator=g), torch.rand(256, generator=g) + 0.1
    tensors, cost = encode(
        weight, ExpertFormat(precision), heed, name="w", device=torch.device("cuda")
    )
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    _, expected = encode(weight, ExpertFormat(precision), heed, name="w")
    assert cost.error == pytest.approx(expected.error, rel=0.01)
    assert cost.num_bits == expected.num_bits


@pytest.mark.gpu
def test_a_gpu_writes_what_a_cpu_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rounding to int8 sums nothing, so it is the same to the bit; tcq2's scales are near."""
    for device in ("cpu", "cuda"):
        made = plan.make(tiny_checkpoint, OPTIONS)
        stream.run(made, tmp_path / device, device=torch.device(device))
    for name in ("experts-002-text.safetensors", "dense-001.safetensors"):
        mine, theirs = (load_file(tmp_path / device / name) for device in ("cpu", "cuda"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for error in relative_errors(tmp_path / "cuda", tiny_checkpoint, 2, Modality.VISION):
        assert error < RELATIVE_ERRORS["tcq2"]
