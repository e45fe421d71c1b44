"""The checks an upload passes before it reaches the engine."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest

from chiasm import errors
from chiasm.services.vision_encoder import upload
from chiasm.services.vision_encoder.upload import Header, Uploads, next_part, receive
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, encoder_pb2

FILE = b"0123456789"
DIGEST = hashlib.sha256(b"image\0" + FILE).hexdigest()
HEADER = Header(digest=DIGEST, kind=MediaKind.IMAGE, size_bytes=len(FILE))


def uploads() -> Uploads:
    return Uploads(max_media_bytes=100, max_upload_bytes=150)


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


@pytest.mark.parametrize("parts", [(FILE,), (FILE[:3], FILE[3:]), (b"", FILE[:9], b"", FILE[9:])])
async def test_file_is_put_together(parts: tuple[bytes, ...]) -> None:
    assert await receive(HEADER, chunks(*parts)) == FILE


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ((), "chunk"),
        ((FILE[:9],), "chunk"),
        ((FILE, b"x"), "chunk"),
        ((b"x" * 11,), "chunk"),
        ((b"x" * 10,), "header.digest"),
    ],
)
async def test_wrong_bytes_are_refused(parts: tuple[bytes, ...], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await receive(HEADER, chunks(*parts))
    assert caught.value.field == field


async def test_digest_covers_the_kind() -> None:
    as_video = Header(digest=DIGEST, kind=MediaKind.VIDEO, size_bytes=len(FILE))
    with pytest.raises(errors.InvalidArgument) as caught:
        await receive(as_video, chunks(FILE))
    assert caught.value.field == "header.digest"


async def test_second_header_is_refused() -> None:
    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        yield header()

    with pytest.raises(errors.InvalidArgument) as caught:
        await receive(HEADER, parts())
    assert caught.value.field == "chunk"


async def test_stalled_upload_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def parts() -> AsyncIterator[encoder_pb2.EncodeRequest]:
        await asyncio.Event().wait()
        yield header()

    monkeypatch.setattr(upload, "CHUNK_TIMEOUT_S", 0.01)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await next_part(parts())
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
