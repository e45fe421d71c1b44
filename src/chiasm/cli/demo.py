"""`chiasm demo`: the whole system once, on a small model and a bundled picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiasm import bundled
from chiasm.cli import failures
from chiasm.client import Client, Delta, Finished, Sampling, Timings, image, user
from chiasm.local import LocalStack, StackConfig

QUESTION = "What is in the picture?"
MAX_TOKENS = 24


def demo(
    model: Annotated[
        Path, typer.Option(help="Checkpoint directory.", show_default="the bundled model")
    ] = bundled.CHECKPOINT,
) -> None:
    """Starts every service, asks about a picture, shows where the time went, stops everything."""
    console = Console(highlight=False)
    with failures.reported():
        stack = LocalStack(StackConfig(model=model))
        try:
            with failures.of_a_start(), console.status("starting the services"):
                endpoint = stack.start()
            console.print(_processes(stack))
            with Client(endpoint) as client:
                finished = _ask(client, console)
        finally:
            stack.stop()
    console.print(_where_the_time_went(finished))
    console.print("stopped all of them")


def _ask(client: Client, console: Console) -> Finished:
    """Streams the answer to the bundled picture's question."""
    picture = bundled.PICTURE
    console.print(f"\n[bold]user[/]       <{picture.name}> {QUESTION}")
    console.print("[bold]assistant[/]  ", end="")
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0)
    for event in client.generate([user(image(picture), QUESTION)], sampling=sampling):
        if isinstance(event, Delta):
            console.print(event.text, end="", markup=False)
        elif isinstance(event, Finished):
            finished = event
    console.print("\n")
    return finished


def _processes(stack: LocalStack) -> Table:
    table = Table("process", "pid", "address", title="running", title_justify="left")
    for name, child in stack.children.items():
        table.add_row(name, str(child.pid), child.address() or "")
    return table


def _where_the_time_went(finished: Finished) -> Table:
    t: Timings = finished.timings
    usage = finished.usage
    rows = (
        ("layout", "gateway: template, tokens", t.layout_ns),
        ("encode", f"vision encoder: {usage.prompt_image_tokens} image tokens", t.encode_ns),
        ("fetch", "embeddings, encoder to decoder", t.fetch_ns),
        ("queue", "decoder: waiting for admission", t.queue_ns),
        ("prefill", f"decoder: {usage.prompt_tokens} prompt tokens", t.prefill_ns),
        ("decode", f"decoder: {usage.completion_tokens} new tokens", t.decode_ns),
        ("  text experts", "of prefill and decode: waiting for the pool", t.text_expert_wait_ns),
        ("  vision experts", "the same for the other pool", t.vision_expert_wait_ns),
        ("total", "as the gateway saw it", t.total_ns),
    )
    table = Table("part", "what", title="where the time went", title_justify="left")
    table.add_column("ms", justify="right")
    for part, what, ns in rows:
        table.add_row(part, what, f"{ns / 1e6:.1f}")
    return table
