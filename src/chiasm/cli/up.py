"""`chiasm up`: the whole system on this machine, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import structlog
import typer
from rich.console import Console

from chiasm import bundled, errors
from chiasm.cli import failures, running
from chiasm.local import Interrupted, LocalStack, StackConfig, describe
from chiasm.telemetry import logs

CHECK_S = 0.5

log = structlog.get_logger()

Autoscale = Annotated[
    bool, typer.Option("--autoscale", help="Start and stop replicas by load; place their shards.")
]
MaxReplicas = Annotated[int, typer.Option(help="With --autoscale: most replicas of each kind.")]
VideoAdvance = Annotated[
    Literal["original", "transformers"] | None,
    typer.Option(help="Rule of positions after a video; unset: the checkpoint's."),
]


def up(
    model: Annotated[
        Path, typer.Option(help="Checkpoint directory.", show_default="the bundled model")
    ] = bundled.CHECKPOINT,
    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway; 0: a free one.")] = 8000,
    text_shards: Annotated[int, typer.Option(help="Shards of the text pool.")] = 2,
    text_servers: Annotated[int, typer.Option(help="Servers that share them.")] = 1,
    vision_shards: Annotated[int, typer.Option(help="Shards of the vision pool.")] = 2,
    vision_servers: Annotated[int, typer.Option(help="Servers that share them.")] = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Element type of the model.")
    ] = "bfloat16",
    colocate: Annotated[
        bool, typer.Option("--colocate", help="Run the pools inside the decoder.")
    ] = False,
    autoscale: Autoscale = False,
    max_replicas: MaxReplicas = 2,
    video_advance: VideoAdvance = None,
    orchestrator_port: Annotated[
        int, typer.Option(help="Port of the orchestrator; 0: a free one.")
    ] = 0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for the logs; unset: a temporary one.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="What to log.")
    ] = "info",
    startup_timeout: Annotated[
        float, typer.Option(help="Seconds until every part must be ready.")
    ] = 600.0,
) -> None:
    """Starts every service as a process of its own and prints `ready HOST:PORT` when all are there.

    Runs until SIGTERM or Ctrl-C. Exit status: 0, or 2 for flags that cannot be, or 1 when a part
    does not come up.
    """
    with failures.reported(), _flags_named():
        config = StackConfig(
            model=model,
            host=host,
            port=port,
            text_shards=text_shards,
            text_servers=text_servers,
            vision_shards=vision_shards,
            vision_servers=vision_servers,
            dtype=dtype,
            colocate=colocate,
            autoscale=autoscale,
            max_replicas=max_replicas,
            video_advance=video_advance,
            orchestrator_port=orchestrator_port,
            log_dir=log_dir,
            log_level=log_level,
            startup_timeout_s=startup_timeout,
        )
    logs.configure("up", level=log_level)
    _run(LocalStack(config))


def _run(stack: LocalStack) -> None:
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        stop.set()
        stack.interrupt()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_signal)
    try:
        with failures.of_a_start():
            address = _start(stack)
    except Interrupted:
        return
    try:
        with running.published(stack.orchestrator):
            log.info("up", orchestrator=stack.orchestrator, logs=str(stack.log_dir))
            sys.stdout.write(f"ready {address}\n")
            sys.stdout.flush()
            while not stop.wait(CHECK_S):
                stack.reconcile()
                for child in stack.newly_dead():
                    log.error("process_died", process=child.name, exit_code=child.exit_code)
    finally:
        stack.stop()


def _start(stack: LocalStack) -> str:
    """Starts the stack, on a terminal with a line that tells how far it is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return stack.start()
    with console.status("starting") as line:
        return stack.start(lambda topology: line.update(f"starting: {describe(topology)}"))


@contextlib.contextmanager
def _flags_named() -> Iterator[None]:
    """Renames the field of a refused configuration to its flag."""
    try:
        yield
    except errors.InvalidArgument as error:
        flag = f"--{error.field.replace('_', '-')}"
        raise errors.InvalidArgument(flag, error.description) from None
