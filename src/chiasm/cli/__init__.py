"""The `chiasm` command: one file per command here, and the services' own programs."""

from __future__ import annotations

from importlib import import_module

import typer

from chiasm.cli.bench import bench
from chiasm.cli.chat import chat
from chiasm.cli.convert import convert
from chiasm.cli.demo import demo
from chiasm.cli.eval import evaluate
from chiasm.cli.generate import generate
from chiasm.cli.status import status
from chiasm.cli.synth import synth
from chiasm.cli.train import train
from chiasm.cli.up import up

_SERVICES = {
    "gateway": ("chiasm.services.gateway", "Run a gateway: the public API."),
    "vision-encoder": ("chiasm.services.vision_encoder", "Run a vision encoder."),
    "decoder": ("chiasm.services.decoder", "Run a decoder."),
    "expert-pool": ("chiasm.services.expert_pool", "Run an expert server."),
    "orchestrator": ("chiasm.orchestrator", "Run the orchestrator."),
}
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="chiasm",
    help="Serves ERNIE-4.5-VL as separate services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `chiasm` script."""
    app()


def _add_service(name: str, module: str, help_text: str) -> None:
    """Adds a service's program; it parses its flags itself, and torch is imported only for it."""

    @app.command(
        name,
        help=help_text,
        add_help_option=False,
        context_settings=_PASS_ON,
        rich_help_panel="Services",
    )
    def run(context: typer.Context) -> None:
        import_module(f"{module}.__main__").main(context.args)


for _command in (up, status, generate, chat, demo, synth, convert, train):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(bench)
for _name, (_module, _help) in _SERVICES.items():
    _add_service(_name, _module, _help)
