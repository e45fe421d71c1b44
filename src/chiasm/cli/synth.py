"""`chiasm synth`: a random checkpoint to try the system with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli import failures


def synth(
    directory: Annotated[Path, typer.Argument(help="New or empty folder to write into.")],
    preset: Annotated[str, typer.Option(help="Dimensions of the model.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Writes a random checkpoint with the model's structure, tokenizer and configuration."""
    from chiasm.model.synth import synthesize

    with failures.reported():
        synthesize(directory, preset=preset, seed=seed, dtype=dtype)
