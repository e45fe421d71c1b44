"""Certificates for tests, signed by a CA of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

from chiasm.types import TlsFiles


@dataclass(frozen=True)
class Authority:
    """A CA and the folder its files go into."""

    folder: Path
    ca: trustme.CA

    @classmethod
    def new(cls, folder: Path) -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(folder / "ca.crt"))
        return cls(folder, ca)

    @property
    def path(self) -> Path:
        return self.folder / "ca.crt"

    def issue(self, *names: str, to: str = "tls", name: str = "") -> TlsFiles:
        """A certificate for these names in `{to}.crt` and `{to}.key`, over a former one."""
        issued = self.ca.issue_cert(*names)
        files = TlsFiles(
            ca=self.path, cert=self.folder / f"{to}.crt", key=self.folder / f"{to}.key", name=name
        )
        key, chain = self.folder / f".{to}.key", self.folder / f".{to}.crt"
        issued.private_key_pem.write_to_path(str(key))
        issued.cert_chain_pems[0].write_to_path(str(chain))
        key.replace(self.folder / f"{to}.key")
        chain.replace(self.folder / f"{to}.crt")
        return files


def flags(files: TlsFiles) -> list[str]:
    """The command line of a service with these files."""
    given = ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]
    return [*given, "--tls-name", files.name] if files.name else given
