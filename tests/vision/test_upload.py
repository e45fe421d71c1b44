"""The checks an upload passes before it reaches the engine."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import AsyncIterator
from typing import IO

import pytest

from chiasm import errors
from chiasm.services.vision_encoder import upload
from chiasm.services.vision_encoder.upload import Header, Uploads, next_part
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, encoder_pb2

FILE = b"0123456789"
DIGEST = hashlib.sha256(b"image\0" + FILE).hexdigest()
HEADER = Header(digest=DIGEST, kind=MediaKind.IMAGE, size_bytes=len(FILE))


def uploads(max_memory_bytes: int = 100) -> Uploads:
    return Uploads(max_media_bytes=100, max_upload_bytes=150, max_memory_bytes=max_memory_bytes)


def header(**changes: object) -> encoder_pb2.EncodeRequest:
    fields = {"digest": DIGEST, "kind": common_pb2.MEDIA_KIND_IMAGE, "size_bytes": 10, **changes}
    return encoder_pb2.EncodeRequest(header=encoder_pb2.EncodeHeader(**fields))


async def chunks(*parts: bytes) -> AsyncIterator[encoder_pb2.EncodeRequest]:
    for part in parts:
        yield encoder_pb2.EncodeRequest(chunk=part)


def test_header_is_decoded() -> None:
    assert uploads().header(header()) == HEADER


@pytest.mark.parametrize(
    ("first", "field"),
    [
        (None, "header"),
        (encoder_pb2.EncodeRequest(chunk=b"x"), "header"),
        (encoder_pb2.EncodeRequest(), "header"),
        (header(digest=DIGEST.upper()), "header.digest"),
        (header(digest=DIGEST + "\n"), "header.digest"),
        (header(digest=""), "header.digest"),
        (header(kind=0), "header.kind"),
        (header(kind=9), "header.kind"),
        (header(size_bytes=0), "header.size_bytes"),
        (header(size_bytes=101), "header.size_bytes"),
        (header(size_bytes=2**63), "header.size_bytes"),
    ],
)
def test_wrong_header_is_refused(first: encoder_pb2.EncodeRequest | None, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        uploads().header(first)
    assert caught.value.field == field


@pytest.mark.parametrize("parts", [(FILE,), (FILE[:3], FILE[3:])])
@pytest.mark.parametrize("max_memory_bytes", [0, 9, 10])
async def test_file_is_put_together(max_memory_bytes: int, parts: tuple[bytes, ...]) -> None:
    with await uploads(max_memory_bytes).receive(HEADER, chunks(*parts)) as file:
        assert isinstance(file, io.BytesIO) is (max_memory_bytes >= len(FILE))
        file.seek(0)
        assert file.read() == FILE


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ((), "chunk"),
        ((FILE[:9],), "chunk"),
        ((FILE, b"x"), "chunk"),
        ((b"x" * 11,), "chunk"),
        ((FILE[:3], b"", FILE[3:]), "chunk"),
        ((b"x" * 10,), "header.digest"),
    ],
)
@pytest.mark.parametrize("max_memory_bytes", [0, 10])
async def test_wrong_bytes_are_refused(
    max_memory_bytes: int, parts: tuple[bytes, ...], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watched_files(monkeypatch)
    with pytest.raises(errors.InvalidArgument) as caught:
        await uploads(max_memory_bytes).receive(HEADER, chunks(*parts))
    assert caught.value.field == field
    assert len(made) == (not max_memory_bytes)
    assert all(file.closed for file in made)


def watched_files(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """Temporary files made from now on; none of them has a name."""
    made: list[IO[bytes]] = []
    make = tempfile.TemporaryFile

    def make_and_note() -> IO[bytes]:
        made.append(make())
        assert not os.stat(made[-1].fileno()).st_nlink
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", make_and_note)
    return made


async def test_upload_that_is_given_up_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched_files(monkeypatch)

    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        yield encoder_pb2.EncodeRequest(chunk=FILE[:5])
        await asyncio.Event().wait()

    upload_task = asyncio.create_task(uploads(0).receive(HEADER, parts()))
    await asyncio.sleep(0.05)
    upload_task.cancel()
    await asyncio.wait({upload_task})
    assert [file.closed for file in made] == [True]


async def test_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> IO[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(errors.ResourceExhausted, match="No space left") as caught:
        await uploads(0).receive(HEADER, chunks(FILE))
    assert caught.value.retry_after_s is not None


async def test_digest_covers_the_kind() -> None:
    as_video = Header(digest=DIGEST, kind=MediaKind.VIDEO, size_bytes=len(FILE))
    with pytest.raises(errors.InvalidArgument) as caught:
        await uploads().receive(as_video, chunks(FILE))
    assert caught.value.field == "header.digest"


async def test_second_header_is_refused() -> None:
    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        yield header()

    with pytest.raises(errors.InvalidArgument) as caught:
        await uploads().receive(HEADER, parts())
    assert caught.value.field == "chunk"


async def test_stalled_upload_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        await asyncio.Event().wait()
        yield header()

    monkeypatch.setattr(upload, "CHUNK_TIMEOUT_S", 0.01)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await next_part(parts())
    assert caught.value.reason == "UPLOAD_STALLED"


async def test_slow_upload_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However regularly it brings a byte."""

    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        for byte in FILE:
            await asyncio.sleep(0.01)
            yield encoder_pb2.EncodeRequest(chunk=bytes([byte]))

    monkeypatch.setattr(upload, "UPLOAD_TIMEOUT_S", 0.05)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await uploads().receive(HEADER, parts())
    assert caught.value.reason == "UPLOAD_STALLED"


def test_uploads_share_a_budget() -> None:
    held = uploads()
    with held.reserve(100), held.reserve(50):
        with pytest.raises(errors.ResourceExhausted) as caught, held.reserve(1):
            pass
        assert caught.value.retry_after_s is not None
    with pytest.raises(ZeroDivisionError), held.reserve(150):
        raise ZeroDivisionError
    with held.reserve(150):
        pass
