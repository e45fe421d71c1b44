"""Media intake: `data:` URIs, size bounds, the look at the header, the digest.

Nothing here decodes pixels. A file is refused by what its header declares before an encoder sees
it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from chiasm import errors
from chiasm.model.probe import VideoLimits, probe_image, probe_video
from chiasm.services.gateway.domain import MediaItem, MediaSource
from chiasm.types import MediaKind

_SCHEME = "data:"
_WHITESPACE = b" \t\r\n\f\v"
_SLICE_CHARS = 1 << 16


def digest(kind: MediaKind, data: bytes) -> str:
    """Lower-case hex SHA-256 over the kind's name, a zero byte and the file."""
    hashed = hashlib.sha256(f"{kind}\0".encode())
    hashed.update(data)
    return hashed.hexdigest()


def data_uri(uri: str, *, field: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI (RFC 2397), base64-coded or percent-coded.

    Raises InvalidArgument for another scheme, a malformed URI, or more than `max_bytes`, which is
    found out before more memory than a few times that is taken.
    """
    if uri[: len(_SCHEME)].lower() != _SCHEME:
        scheme = uri.partition(":")[0][:32]
        raise errors.InvalidArgument(
            field, f"only data: URIs are accepted, not {scheme!r}; nothing is fetched"
        )
    header, comma, payload = uri[len(_SCHEME) :].partition(",")
    if not comma:
        raise errors.InvalidArgument(field, "the data: URI has no comma before its data")
    is_base64 = header.rpartition(";")[2].strip().lower() == "base64" and ";" in header
    max_coded_bytes = max_bytes * 4 // 3 + 4 if is_base64 else max_bytes
    data = bytearray()
    for part in _unquoted(payload):
        data += part.translate(None, _WHITESPACE) if is_base64 else part
        if len(data) > max_coded_bytes:
            raise errors.InvalidArgument(field, f"longer than {max_bytes} bytes")
    if not is_base64:
        return bytes(data)
    data += b"=" * (-len(data) % 4)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise errors.InvalidArgument(field, f"malformed base64: {error}") from None


def _unquoted(text: str) -> Iterator[bytes]:
    """Percent-decoded slices: the decoder takes some hundred bytes of memory for every escape."""
    start = 0
    while start < len(text):
        end = start + _SLICE_CHARS
        escape = text.find("%", end - 2, end)  # one that the end would cut
        end = end if escape < 0 else escape
        yield unquote_to_bytes(text[start:end])
        start = end


def take_in(source: MediaSource, *, max_bytes: int, max_image_pixels: int) -> MediaItem:
    """The item of a source, bounded and with a plausible header. Runs long: use a thread.

    Raises InvalidArgument with the source's field.
    """
    data = source.data
    if source.uri:
        data = data_uri(source.uri, field=f"{source.field}.uri", max_bytes=max_bytes)
    if not data:
        raise errors.InvalidArgument(source.field, f"the {source.kind} is empty")
    if len(data) > max_bytes:
        raise errors.InvalidArgument(
            source.field, f"the {source.kind} has {len(data)} bytes, limit {max_bytes}"
        )
    _probe(source, data, max_image_pixels)
    return MediaItem(
        kind=source.kind, field=source.field, data=data, digest=digest(source.kind, data)
    )


def _probe(source: MediaSource, data: bytes, max_pixels: int) -> None:
    try:
        if source.kind is MediaKind.IMAGE:
            probe_image(data, max_pixels=max_pixels)
        else:
            probe_video(data, VideoLimits.beside_images(max_pixels))
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(source.field, error.description) from None
