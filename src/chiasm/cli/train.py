"""`chiasm train`: a small model by the model's own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from chiasm.cli import failures
from chiasm.errors import InvalidArgument
from chiasm.telemetry import logs

_OF_A_NEW_RUN = ("preset", "out", "stage", "model", "ablation", "seed")


def train(
    context: typer.Context,
    preset: Annotated[
        str, typer.Option(help="What to train: bundled, smoke or ablation.")
    ] = "bundled",
    out: Annotated[Path, typer.Option(help="New folder for the run.")] = Path("run"),
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run to go on with; its settings hold.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Only this stage: language, longer, sight, joint or words."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the preset's dimensions to begin with, as its folder."),
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="Leave out: no-orthogonality, no-isolation or no-token-balance."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and samples.")] = 0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps; --resume goes on.")
    ] = None,
) -> None:
    """Trains on tasks made as it goes; writes a checkpoint that serves to OUT/model."""
    from chiasm.training import run
    from chiasm.training.progress import watching

    logs.configure("train", level="info")
    with failures.reported():
        for name in _OF_A_NEW_RUN if resume is not None else ():
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise InvalidArgument("--resume", f"a run goes on as it began: no --{name}")
        if resume is not None:
            trainer, directory = run.resume(resume), resume
        else:
            config = run.RunConfig(
                preset=preset,
                ablation=ablation,
                stage=stage,
                model=None if model is None else str(model.resolve()),
                seed=seed,
            )
            trainer, directory = run.start(out, config), out
        with watching(
            trainer.preset.num_steps, done=trainer.progress.step, tokens=trainer.progress.tokens
        ) as watch:
            written = run.train(trainer, directory, watch, max_steps=max_steps)
    Console(highlight=False).print(f"wrote {written}")
