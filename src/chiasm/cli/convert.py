"""`chiasm convert`: a checkpoint in low precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from chiasm.cli import failures
from chiasm.telemetry import logs

if TYPE_CHECKING:
    from chiasm.convert.plan import Options, Plan
    from chiasm.model.manifest import Manifest

WIDTH = 100
"""Of the tables where there is no terminal."""


def convert(
    model: Annotated[Path, typer.Option(help="Checkpoint in full width.")],
    out: Annotated[Path, typer.Option(help="Folder to write to, or to go on with.")],
    text_experts: Annotated[str, typer.Option(help="stored, int8, int4 or tcq2.")] = "stored",
    vision_experts: Annotated[str, typer.Option(help="stored, int8, int4 or tcq2.")] = "stored",
    first_layers: Annotated[
        int, typer.Option(min=0, help="So many MoE layers, from the first, in --first-precision.")
    ] = 0,
    first_precision: Annotated[str, typer.Option(help="Precision of the first layers.")] = "int8",
    dense: Annotated[
        str,
        typer.Option(help="The matrices that every token goes through: stored or int8."),
    ] = "stored",
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the inputs of tcq2 matrices: for heavy tails.")
    ] = False,
    calibrate: Annotated[
        int, typer.Option(min=0, help="Training questions whose activations weigh the errors.")
    ] = 0,
    eval_samples: Annotated[
        int, typer.Option("--eval", min=0, help="Held-out questions of each task to compare on.")
    ] = 0,
) -> None:
    """Writes a checkpoint that every command takes, in fewer bits.

    A run that was stopped goes on when it is started again with the same options. What the
    conversion cost is printed and written to OUT/chiasm_conversion.json; --calibrate and --eval use
    the questions of the bundled model, which they are for.
    """
    from chiasm.convert.plan import Options, make

    logs.configure("convert", level="info")
    with failures.reported():
        options = Options(
            text_experts=text_experts,
            vision_experts=vision_experts,
            first_layers=first_layers,
            first_precision=first_precision,
            dense=dense,
            is_rotated=rotate,
            num_calibration=calibrate,
        )
        plan = make(model, options)
        manifest = _run(plan, out, options)
        document = _report(plan, manifest, out)
        if eval_samples:
            _compare(model, out, eval_samples, document)


def _run(plan: Plan, out: Path, options: Options) -> Manifest:
    from chiasm.convert import calibrate, stream
    from chiasm.telemetry.progress import writing

    importance: stream.Importance = stream.nothing_known
    if options.num_calibration:
        with Console(stderr=True).status("calibrating"):
            importance = calibrate.collect(plan.source, options.num_calibration).importance
    with writing("converting", plan.num_bytes) as advance:
        return stream.run(plan, out, importance=importance, on_bytes=advance)


def _report(plan: Plan, manifest: Manifest, out: Path) -> dict[str, Any]:
    from chiasm.convert import report

    rows = report.rows(plan, manifest)
    document = report.document(rows)
    _write(out, document)
    _console().print(report.table(rows))
    return document


def _compare(model: Path, out: Path, num_samples: int, document: dict[str, Any]) -> None:
    from chiasm.convert import quality

    with Console(stderr=True).status("asking") as status:
        found = quality.compare(
            model, out, num_samples, on_task=lambda task: status.update(f"asking: {task}")
        )
    _write(out, document | {"quality": quality.document(found)})
    _console().print(quality.table(found))


def _write(out: Path, document: dict[str, Any]) -> None:
    from chiasm.convert.stream import REPORT

    (out / REPORT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _console() -> Console:
    return Console(highlight=False, width=None if Console().is_terminal else WIDTH)
