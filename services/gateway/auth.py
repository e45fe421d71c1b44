"""API keys: who may call the gateway.

Keys stand in a file, one a line; it is read again when it changes, so keys can be added and taken
back while the gateway runs. Only their digests are kept, and a call's key is compared with all of
them in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

import grpc
import structlog

from chiasm import errors
from chiasm.transport.stamps import stamp

HEALTH, REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection."
KEYLESS: dict[str, tuple[str, ...]] = {
    "none": (),
    "health": (HEALTH,),
    "health+reflection": (HEALTH, REFLECTION),
}
"""Beginnings of the methods that need no key, by the word of `--keyless`."""

MAX_FILE_BYTES = 1 << 20

log = structlog.get_logger()


class ApiKeys:
    """The keys of a file. Raises InvalidArgument for a file that cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._seen = stamp(path)
            self._digests = _read(path)
        except OSError as error:
            raise errors.InvalidArgument("api-keys", f"{path}: {error.strerror}") from None

    def holds(self, key: str) -> bool:
        """Whether this is one of the keys."""
        self._follow()
        given = _digest(key)
        # Every key is looked at, so that the time says nothing about which one is near.
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0

    def _follow(self) -> None:
        """Reads a changed file again; one that cannot be used leaves the old keys in force."""
        try:
            found = stamp(self._path)
            if found == self._seen:
                return
            self._seen, self._digests = found, _read(self._path)
        except (OSError, errors.InvalidArgument) as error:
            log.warning("api_keys_not_read", error=str(error))
            return
        log.info("api_keys_read", num_keys=len(self._digests))


class ApiKeyGuard:
    """Refuses calls without a key that `keys` holds, before anything of them is read.

    A call brings its key as the metadata `authorization: Bearer KEY`. keyless: a word of KEYLESS.
    """

    def __init__(self, keys: ApiKeys, *, keyless: str) -> None:
        self._keys, self._keyless = keys, KEYLESS[keyless]

    def check(self, details: grpc.HandlerCallDetails) -> None:
        if details.method.startswith(self._keyless):
            return
        key = _bearer(details.invocation_metadata or ())
        if key is None:
            raise errors.Unauthenticated("the call has no `authorization: Bearer KEY`")
        if not self._keys.holds(key):
            raise errors.Unauthenticated("the API key is not known")


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The key of a call, if it has one."""
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.strip().partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return key.strip()
    return None


def _read(path: Path) -> tuple[bytes, ...]:
    """Digests of the keys; empty lines and those that begin with # are left out."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise errors.InvalidArgument("api-keys", f"{path} is larger than {MAX_FILE_BYTES} bytes")
    lines = (line.strip() for line in data.decode(errors="replace").splitlines())
    digests = tuple(_digest(line) for line in lines if line and not line.startswith("#"))
    if not digests:
        raise errors.InvalidArgument("api-keys", f"{path} holds no key")
    return digests


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
