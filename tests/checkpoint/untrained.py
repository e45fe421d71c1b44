"""A model with the bundled one's tokenizer, which reads its questions; its weights are random."""

from __future__ import annotations

from pathlib import Path

from train_models import new_model, short_preset

from chiasm.training.export import export


def write(directory: Path) -> Path:
    """One safetensors file beside the description."""
    model = new_model(directory / "description", short_preset(1, 1, 1, 1))
    weights = dict(model.named_parameters())
    out = directory / "model"
    export(model, weights, directory / "description", out, shard_bytes=1 << 30)
    return out
