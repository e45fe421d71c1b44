"""How commands reach a system that asks for TLS or an API key."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from chiasm.transport import tls as credentials
from chiasm.types import TlsFiles

_PANEL = "Connection"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Options for TLS, as typer reads them."""

    tls: Annotated[
        bool,
        typer.Option("--tls", help="Encrypt; --tls-ca does so by itself.", rich_help_panel=_PANEL),
    ] = False
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="CHIASM_TLS_CA",
            metavar="FILE",
            help="PEM certificate of the server's CA; unset: well-known ones.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="CHIASM_TLS_CERT",
            metavar="FILE",
            help="PEM certificate to show.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(
            envvar="CHIASM_TLS_KEY",
            metavar="FILE",
            help="PEM key of --tls-cert.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls_name: Annotated[
        str,
        typer.Option(
            envvar="CHIASM_TLS_NAME",
            help="Name in the server's certificate; unset: the host of --endpoint.",
            rich_help_panel=_PANEL,
        ),
    ] = ""

    def files(self) -> TlsFiles | None:
        """What they describe; None: plain text. Raises InvalidArgument for unusable files."""
        return credentials.of_client(
            encrypts=self.tls,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            name=self.tls_name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Access(TlsOptions):
    """The same, and the key that a gateway may ask for."""

    api_key: Annotated[
        str,
        typer.Option(
            envvar="CHIASM_API_KEY",
            help="Key to show to the gateway. Better set the variable: others can see flags.",
            rich_help_panel=_PANEL,
        ),
    ] = ""


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that its keyword argument `access` consists of.

    typer makes options of parameters, so each field of `TlsOptions` or `Access`, whichever the
    argument's annotation names, becomes a parameter of what is returned.
    """
    own = inspect.signature(command, eval_str=True)
    kind = own.parameters["access"].annotation
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        access = kind(**{name: given.pop(name) for name in names})
        command(**given, access=access)

    parameters = [p for p in own.parameters.values() if p.name != "access"]
    parameters += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=field.default,
        )
        for field in fields(kind)
    ]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined] # PEP 362
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
