"""How commands reach a system that asks for TLS or an API key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm import errors
from chiasm.transport import tls as credentials
from chiasm.types import TlsFiles

_PANEL = "Connection"

Tls = Annotated[
    bool,
    typer.Option("--tls", help="Encrypt; --tls-ca does so by itself.", rich_help_panel=_PANEL),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="CHIASM_TLS_CA",
        metavar="FILE",
        help="PEM certificate of the server's CA; unset: well-known ones.",
        rich_help_panel=_PANEL,
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        envvar="CHIASM_TLS_CERT",
        metavar="FILE",
        help="PEM certificate to show.",
        rich_help_panel=_PANEL,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        envvar="CHIASM_TLS_KEY",
        metavar="FILE",
        help="PEM key of --tls-cert.",
        rich_help_panel=_PANEL,
    ),
]
TlsName = Annotated[
    str,
    typer.Option(
        envvar="CHIASM_TLS_NAME",
        help="Name in the server's certificate; unset: the host of --endpoint.",
        rich_help_panel=_PANEL,
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="CHIASM_API_KEY",
        help="Key to show to the gateway. Better set the variable: others can see flags.",
        rich_help_panel=_PANEL,
    ),
]


def files(
    *, tls: bool, ca: Path | None, cert: Path | None, key: Path | None, name: str
) -> TlsFiles | None:
    """What the options describe; None: plain text. Raises InvalidArgument for unusable files."""
    if (cert is None) != (key is None):
        raise errors.InvalidArgument("", "--tls-cert and --tls-key belong together")
    if not tls and ca is None and cert is None:
        return None
    found = TlsFiles(ca=ca, cert=cert, key=key, name=name)
    credentials.check(found)
    return found
