"""Receives a file in chunks, bounded before memory is taken and checked against its header.

Large files go to a temporary file without a name: its room is free again once it is closed, however
the process ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from chiasm import errors
from chiasm.transport.enums import MEDIA_KINDS
from chiasm.types import MediaKind
from chiasm.v1 import encoder_pb2

CHUNK_TIMEOUT_S = 30.0
"""An upload that brings nothing for this long is given up."""

UPLOAD_TIMEOUT_S = 600.0
"""So is one that is not whole by then."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What an upload announces."""

    digest: str
    kind: MediaKind
    size_bytes: int


async def next_part(
    requests: AsyncIterator[encoder_pb2.EncodeRequest],
) -> encoder_pb2.EncodeRequest | None:
    """The next message, None after the last. Raises DeadlineExceeded when none comes in time."""
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"no part of the upload for {CHUNK_TIMEOUT_S:.0f} s", reason="UPLOAD_STALLED"
        ) from None


class Uploads:
    """Uploads in progress and files waiting for their turn share one budget of bytes."""

    def __init__(
        self, *, max_media_bytes: int, max_upload_bytes: int, max_memory_bytes: int
    ) -> None:
        self._max_media_bytes, self._max_memory_bytes = max_media_bytes, max_memory_bytes
        self._max_upload_bytes = max(max_upload_bytes, max_media_bytes)
        self._held_bytes = 0

    def header(self, first: encoder_pb2.EncodeRequest | None) -> Header:
        """The checked header. Raises InvalidArgument that names the wrong field."""
        if first is None or first.WhichOneof("part") != "header":
            raise errors.InvalidArgument("header", "must come first")
        wire = first.header
        if not _DIGEST.fullmatch(wire.digest):
            raise errors.InvalidArgument("header.digest", "must be 64 lower-case hex digits")
        if wire.kind not in MEDIA_KINDS:
            raise errors.InvalidArgument("header.kind", f"unknown kind {wire.kind}")
        if not 0 < wire.size_bytes <= self._max_media_bytes:
            raise errors.InvalidArgument(
                "header.size_bytes", f"must lie in 1..{self._max_media_bytes}, is {wire.size_bytes}"
            )
        return Header(digest=wire.digest, kind=MEDIA_KINDS[wire.kind], size_bytes=wire.size_bytes)

    async def receive(
        self, header: Header, requests: AsyncIterator[encoder_pb2.EncodeRequest]
    ) -> BinaryIO:
        """The file that follows its header, whole; the caller closes it.

        Raises InvalidArgument when it is shorter or longer than announced or its digest differs,
        DeadlineExceeded when it takes too long, ResourceExhausted when the disk is full.
        """
        is_large = header.size_bytes > self._max_memory_bytes
        try:
            with ExitStack() as held:
                file = held.enter_context(_empty_file(on_disk=is_large))
                async for chunk in _chunks(header, requests):
                    # The event loop does not wait for a disk.
                    await asyncio.to_thread(file.write, chunk) if is_large else file.write(chunk)
                held.pop_all()
        except OSError as error:
            raise errors.ResourceExhausted(
                f"the upload cannot be stored: {error.strerror}", retry_after_s=1.0
            ) from None
        return file

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Holds room for a file. Raises ResourceExhausted when there is none."""
        if self._held_bytes + num_bytes > self._max_upload_bytes:
            raise errors.ResourceExhausted(
                f"{self._held_bytes} bytes of uploads are held, limit {self._max_upload_bytes}",
                retry_after_s=1.0,
            )
        self._held_bytes += num_bytes
        try:
            yield
        finally:
            self._held_bytes -= num_bytes


def _empty_file(*, on_disk: bool) -> BinaryIO:
    if on_disk:
        return tempfile.TemporaryFile()
    return io.BytesIO()


async def _chunks(
    header: Header, requests: AsyncIterator[encoder_pb2.EncodeRequest]
) -> AsyncIterator[bytes]:
    """The pieces of the file, in time; raises InvalidArgument after the last when they are not the
    file."""
    end = time.monotonic() + UPLOAD_TIMEOUT_S
    digest = hashlib.sha256(f"{header.kind}\0".encode())
    num_bytes = 0
    while (part := await next_part(requests)) is not None:
        if part.WhichOneof("part") != "chunk":
            raise errors.InvalidArgument("chunk", "only chunks may follow the header")
        if time.monotonic() > end:
            raise errors.DeadlineExceeded(
                f"the upload took longer than {UPLOAD_TIMEOUT_S:.0f} s", reason="UPLOAD_STALLED"
            )
        if not part.chunk:
            raise errors.InvalidArgument("chunk", "is empty")
        num_bytes += len(part.chunk)
        if num_bytes > header.size_bytes:
            raise errors.InvalidArgument(
                "chunk", f"more than the {header.size_bytes} bytes announced"
            )
        digest.update(part.chunk)
        yield part.chunk
    if num_bytes < header.size_bytes:
        raise errors.InvalidArgument(
            "chunk", f"upload ended after {num_bytes} of {header.size_bytes} bytes"
        )
    if digest.hexdigest() != header.digest:
        raise errors.InvalidArgument("header.digest", "differs from the digest of the bytes")
