"""When a conversion asks for calibration, and what it then takes of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint import untrained
from checkpoint.test_convert import MIXED

from chiasm.convert import memory, plan, stream
from chiasm.convert.model import WholeModel
from chiasm.convert.plan import Options
from chiasm.errors import ResourceExhausted


def asked(source: Path, out: Path, options: Options) -> int:
    """How often a run asks."""
    times = []

    def calibrated() -> stream.Importance:
        times.append(1)
        return stream.nothing_known

    stream.run(plan.make(source, options), out, calibrated=calibrated)
    return len(times)


def test_asked_when_something_is_missing_that_it_weighs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert asked(tiny_checkpoint, out, MIXED) == 1
    assert asked(tiny_checkpoint, out, MIXED) == 0
    (out / "experts-001-vision.safetensors").unlink()  # int8
    (out / "model-00001.safetensors").unlink()
    assert asked(tiny_checkpoint, out, MIXED) == 0
    damaged = out / "experts-003-vision.safetensors"  # tcq2
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert asked(tiny_checkpoint, out, MIXED) == 1
    assert asked(tiny_checkpoint, tmp_path / "int8", Options(text_experts="int8")) == 0


def held_bytes(directory: Path, dtype: torch.dtype) -> int:
    model = WholeModel(directory, dtype)
    modules = (model._language, model._vision, model._resampler)
    parameters = [p for module in modules for p in module.parameters()]
    return sum(p.nbytes for p in parameters) + sum(b.weight_bytes for b in model.banks.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_estimates_are_what_models_take(tmp_path: Path, dtype: torch.dtype) -> None:
    source, out = untrained.write(tmp_path), tmp_path / "out"
    made = plan.make(source, Options(text_experts="int4", vision_experts="int8"))
    stream.run(made, out)
    estimates = memory.source_bytes(made, dtype), memory.result_bytes(made, dtype)
    for directory, estimate in zip((source, out), estimates, strict=True):
        assert estimate == pytest.approx(held_bytes(directory, dtype), rel=0.05)


def test_what_is_available_is_no_more_than_there_is() -> None:
    free = memory.available_bytes()
    if free is not None:
        memory.require("--eval", free // 2)
        with pytest.raises(ResourceExhausted) as refusal:
            memory.require("--eval", 1 << 60)
        assert refusal.value.field == "--eval"


def test_where_the_system_does_not_say_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.available_bytes() is None
    memory.require("--eval", 1 << 60)
