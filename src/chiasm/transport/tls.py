"""TLS between the services and towards clients, from PEM files.

`use` says once, at the start of a program, what its port shows and with what it calls the other
services; ports and channels that are opened later follow. A port reads its files again when they
change, so a renewed certificate needs no restart; a channel reads them when it is opened.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from chiasm import errors
from chiasm.transport.stamps import Stamp, stamp
from chiasm.types import TlsFiles

log = structlog.get_logger()


@dataclass(slots=True)
class _Process:
    """TLS of this process; None is plain text."""

    port: TlsFiles | None = None
    peers: TlsFiles | None = None


_process = _Process()


def use(*, port: TlsFiles | None, peers: TlsFiles | None) -> None:
    """Sets what the ports and the channels of this process use.

    Raises InvalidArgument for files that cannot be used.
    """
    for files in (port, peers):
        if files is not None:
            check(files)
    _process.port, _process.peers = port, peers


def of_port() -> TlsFiles | None:
    """What the process's gRPC port uses; None: plain text."""
    return _process.port


def of_peers() -> TlsFiles | None:
    """With what the process calls the other services; None: plain text."""
    return _process.peers


def of_client(
    *, encrypts: bool, ca: Path | None, cert: Path | None, key: Path | None, name: str
) -> TlsFiles | None:
    """With what a client calls a system, from its options; None: plain text.

    encrypts: also without any file. Raises InvalidArgument for files that cannot be used.
    """
    if (cert is None) != (key is None):
        raise errors.InvalidArgument("", "--tls-cert and --tls-key belong together")
    if not encrypts and ca is None and cert is None:
        return None
    files = TlsFiles(ca=ca, cert=cert, key=key, name=name)
    check(files)
    return files


def check(files: TlsFiles) -> None:
    """Raises InvalidArgument unless the files are there, are PEM, and key and certificate match."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if files.ca is not None:
            context.load_verify_locations(files.ca)
    except (OSError, ValueError) as error:
        raise errors.InvalidArgument("tls-ca", f"{files.ca}: {_reason(error)}") from None
    try:
        if files.cert is not None:
            # A key with a passphrase would ask for it on the terminal.
            context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise errors.InvalidArgument("tls-cert", f"{files.cert}: {_reason(error)}") from None


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a caller; without a CA the system's are trusted."""
    return grpc.ssl_channel_credentials(
        root_certificates=_read(files.ca),
        private_key=_read(files.key),
        certificate_chain=_read(files.cert),
    )


def channel_options(files: TlsFiles) -> list[tuple[str, str]]:
    """Options of a caller: the name that the server's certificate must bear, if not its host."""
    return [("grpc.ssl_target_name_override", files.name)] if files.name else []


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a port; with a CA, callers must show a certificate that it has signed."""
    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(files),
        _Renewals(files).fetch,  # type: ignore[arg-type] # None is allowed: nothing has changed
        require_client_authentication=files.ca is not None,
    )


class _Renewals:
    """Looks before each handshake whether the files have changed."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamp()

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate, or None where the one in use still holds."""
        try:
            found = self._stamp()
            if found == self._seen:
                return None
            check(self._files)
            renewed = _server_configuration(self._files)
        except (OSError, errors.InvalidArgument) as error:
            # Half written, or gone: whoever renews it is not done.
            log.warning("certificate_not_renewed", error=str(error))
            return None
        self._seen = found
        log.info("certificate_renewed", path=str(self._files.cert))
        return renewed

    def _stamp(self) -> Stamp:
        paths = (self._files.cert, self._files.key, self._files.ca)
        return stamp(*(path for path in paths if path is not None))


def _server_configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    if files.cert is None or files.key is None:
        raise errors.InvalidArgument("tls-cert", "a port needs a certificate and its key")
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=_read(files.ca))


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None else None


def _reason(error: Exception) -> str:
    """OpenSSL's word or the system's, without the path and the numbers around it."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
