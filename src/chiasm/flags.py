"""Command lines of service processes, made from their settings classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsError

from chiasm.child import exit_with_parent
from chiasm.config import ProcessSettings
from chiasm.errors import ChiasmError

SettingsT = TypeVar("SettingsT", bound=BaseSettings)

EXIT_FAILED, EXIT_USAGE = 1, 2


class Main(Protocol):
    """A program: takes its arguments, by default the process's, and exits."""

    def __call__(self, argv: Sequence[str] | None = None) -> NoReturn: ...


def parse_settings(
    settings_cls: type[SettingsT], argv: Sequence[str] | None = None, *, prog: str
) -> SettingsT:
    """Settings from flags, then the environment and YAML, then defaults.

    A field `kv_blocks` is the flag `--kv-blocks`, a bool has `--no-...` beside it. A field whose
    validator reads one word into a tuple or list must be marked NoDecode. Wrong settings end the
    process with one line on stderr that names the flag, and exit code 2.
    """
    source: CliSettingsSource[SettingsT] = CliSettingsSource(
        settings_cls,
        cli_prog_name=prog,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )
    try:
        args = sys.argv[1:] if argv is None else list(argv)
        return CliApp.run(settings_cls, cli_args=args, cli_settings_source=source)
    except ValidationError as error:
        _exit(prog, "; ".join(map(_describe, error.errors())), EXIT_USAGE)
    except SettingsError as error:
        _exit(prog, str(error), EXIT_USAGE)


def settings_command(
    settings_cls: type[SettingsT], serve: Callable[[SettingsT], int], *, prog: str
) -> Main:
    """The `main` of a program that parses its settings, serves, and exits with its code.

    What `serve` raises before it has a log, such as a ChiasmError about the model's folder, is one
    line on stderr and exit code 1.
    """

    def main(argv: Sequence[str] | None = None) -> NoReturn:
        exit_with_parent()
        settings = parse_settings(settings_cls, argv, prog=prog)
        try:
            _secure(settings)
            code = serve(settings)
        except (ChiasmError, OSError) as error:
            _exit(prog, str(error), EXIT_FAILED)
        sys.exit(code)

    return main


def _secure(settings: BaseSettings) -> None:
    """Has every port and channel of the process use the TLS that its settings name."""
    if isinstance(settings, ProcessSettings):
        from chiasm.transport import tls

        tls.use(port=settings.port_tls, peers=settings.peer_tls)


def _describe(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    flag = str(error["loc"][0]).replace("_", "-")
    return f"--{flag}: {message}"


def _exit(prog: str, message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{prog}: {message}\n")
    sys.exit(code)
