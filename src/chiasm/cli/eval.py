"""`chiasm eval`: how well a running system answers held-out questions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiasm import errors
from chiasm.cli import connection, failures
from chiasm.cli.generate import DEFAULT_ENDPOINT, Endpoint
from chiasm.client import AsyncClient

if TYPE_CHECKING:
    from chiasm.training.evaluate import Score

WIDTH = 100
"""Of the table where there is no terminal."""


@connection.options
def evaluate(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 200,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the scores here, too.")
    ] = None,
    *,
    access: connection.Access,
) -> None:
    """Asks a running system questions that its bundled model never trained on, task by task.

    Exit status: 0 when every task reaches its threshold, 1 when one does not or a request fails, 2
    for options that cannot be.
    """
    with failures.reported():
        if json_file is not None and not json_file.parent.is_dir():
            raise errors.InvalidArgument("--json", f"there is no folder {str(json_file.parent)!r}")
        scores = asyncio.run(_evaluate(endpoint, access, samples))
        try:
            if json_file is not None:
                _write(json_file, scores)
        finally:
            width = None if Console().is_terminal else WIDTH
            Console(highlight=False, width=width).print(table(scores))
    if not all(score.is_passed for score in scores):
        raise typer.Exit(failures.FAILED)


async def _evaluate(endpoint: str, access: connection.Access, num_samples: int) -> list[Score]:
    from chiasm.training.evaluate import evaluate

    status = Console(stderr=True).status("asking")
    async with AsyncClient(endpoint, tls=access.files(), api_key=access.api_key) as client:
        await client.wait_ready()
        with status:
            return await evaluate(
                client, num_samples, on_task=lambda task: status.update(f"asking: {task}")
            )


def _write(file: Path, scores: Sequence[Score]) -> None:
    from chiasm.training.evaluate import document

    text = json.dumps(document(scores), ensure_ascii=False, indent=1)
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise errors.FailedPrecondition(str(error)) from None


def table(scores: Sequence[Score]) -> Table:
    """The scores, one task a row."""
    view = Table("task", title="held-out questions", title_justify="left")
    for header in ("n", "accuracy", "95 % interval", "threshold"):
        view.add_column(header, justify="right")
    view.add_column("result")
    for score in scores:
        low, high = score.interval
        view.add_row(
            score.task,
            str(score.num_samples),
            f"{score.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{score.threshold:.0%}",
            "[green]pass[/]" if score.is_passed else "[red]fail[/]",
        )
    return view
