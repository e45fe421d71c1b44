"""`chiasm convert`: a checkpoint in low precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from chiasm.cli import failures
from chiasm.errors import InvalidArgument
from chiasm.telemetry import logs

if TYPE_CHECKING:
    import torch

    from chiasm.convert.plan import Options, Plan
    from chiasm.model.manifest import Manifest

WIDTH = 100
"""Of the tables where there is no terminal."""

PRECISIONS = "stored, int8, int4 or tcq2."
FIRST_LAYERS = (
    "So many MoE layers, from the first, in --first-precision; unset: an eighth of those of a tcq2 "
    "bank, none of others."
)
CALIBRATE = (
    "Training questions whose activations weigh the errors of int4 and tcq2; the whole model is "
    "held in memory in float32 for them."
)
EVAL = (
    "Held-out questions of each task to compare on; the whole model in bfloat16 and the result are "
    "held in memory for them."
)


def convert(
    model: Annotated[Path, typer.Option(help="Checkpoint in full width.")],
    out: Annotated[Path, typer.Option(help="Folder to write to, or to go on with.")],
    text_experts: Annotated[str, typer.Option(help=PRECISIONS)] = "stored",
    vision_experts: Annotated[str, typer.Option(help=PRECISIONS)] = "stored",
    first_layers: Annotated[int | None, typer.Option(min=0, help=FIRST_LAYERS)] = None,
    first_precision: Annotated[str, typer.Option(help="Precision of the first layers.")] = "int8",
    dense: Annotated[
        str,
        typer.Option(help="The matrices that every token goes through: stored or int8."),
    ] = "stored",
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the inputs of tcq2 matrices: for heavy tails.")
    ] = False,
    calibrate: Annotated[int, typer.Option(min=0, help=CALIBRATE)] = 0,
    eval_samples: Annotated[int, typer.Option("--eval", min=0, help=EVAL)] = 0,
    device: Annotated[
        str, typer.Option(help="Where matrices are encoded, one at a time: cpu, or as cuda:0.")
    ] = "cpu",
) -> None:
    """Writes a checkpoint that every command takes, in fewer bits.

    A run that was stopped goes on when it is started again with the same options. What the
    conversion cost is printed and written to OUT/chiasm_conversion.json; --calibrate and --eval use
    the questions of the bundled model, which they are for.
    """
    from chiasm.convert import memory, quality
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
        plan, place = make(model, options), _device(device)
        if eval_samples:  # before hours of work, not after them
            needed = memory.source_bytes(plan, quality.DTYPE)
            needed += memory.result_bytes(plan, quality.DTYPE)
            memory.require("--eval", needed)
        manifest = _run(plan, out, options, place)
        document = _report(plan, manifest, out)
        if eval_samples:
            _compare(model, out, eval_samples, document)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgument("--device", f"{name!r} is none") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument("--device", f"matrices are encoded by cpu or cuda, not {device.type}")
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise InvalidArgument("--device", f"{name} is not there")
    return device


def _run(plan: Plan, out: Path, options: Options, device: torch.device) -> Manifest:
    from chiasm.convert import calibrate, memory, stream
    from chiasm.telemetry.progress import writing

    def calibrated() -> stream.Importance:
        if not options.num_calibration:
            return stream.nothing_known
        memory.require("--calibrate", memory.source_bytes(plan, calibrate.DTYPE))
        return calibrate.collect(plan.source, options.num_calibration).importance

    with writing("converting", plan.num_bytes) as advance:
        return stream.run(plan, out, calibrated=calibrated, device=device, on_bytes=advance)


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
