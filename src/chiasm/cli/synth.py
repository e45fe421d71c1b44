"""`chiasm synth`: a random checkpoint to try the system with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli import failures
from chiasm.telemetry import logs


def synth(
    directory: Annotated[Path, typer.Argument(help="New or empty folder to write into.")],
    preset: Annotated[str, typer.Option(help="Dimensions of the model.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    experts: Annotated[
        str, typer.Option(help="Routed experts: stored (as --dtype), int8, int4 or tcq2.")
    ] = "stored",
    dense: Annotated[
        str, typer.Option(help="The language model's other matrices: stored or int8.")
    ] = "stored",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers; unset: the preset's.")
    ] = None,
) -> None:
    """Writes a random checkpoint with the model's structure, tokenizer and configuration."""
    from chiasm.model.synth import find, synthesize

    logs.configure("synth", level="info")
    with failures.reported():
        dimensions = find(preset)
        if layers is not None:
            dimensions = replace(dimensions, num_layers=layers)
        synthesize(
            directory, preset=dimensions, seed=seed, dtype=dtype, experts=experts, dense=dense
        )
