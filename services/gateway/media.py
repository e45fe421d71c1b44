"""Media intake: `data:` URIs, size bounds, the look at the header, the digest.

Nothing here decodes pixels. A file is refused by what its header declares before an encoder sees
it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from urllib.parse import unquote_to_bytes

from chiasm import errors
from chiasm.model.probe import VideoLimits, probe_image, probe_video
from chiasm.services.gateway.domain import MediaItem, MediaSource
from chiasm.types import MediaKind

_SCHEME = "data:"
_WHITESPACE = b" \t\r\n\f\v"


def digest(kind: MediaKind, data: bytes) -> str:
    """Lower-case hex SHA-256 over the kind's name, a zero byte and the file."""
    hashed = hashlib.sha256(f"{kind}\0".encode())
    hashed.update(data)
    return hashed.hexdigest()


def data_uri(uri: str, *, field: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URI (RFC 2397), base64-coded or percent-coded.

    Raises InvalidArgument for another scheme, a malformed URI, or more than `max_bytes`, which is
    found out before they are decoded.
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
    # Percent-coding may triple every character of either form.
    if len(payload) > 3 * (max_bytes * 4 // 3 + 4):
        raise errors.InvalidArgument(field, f"longer than {max_bytes} bytes")
    data = unquote_to_bytes(payload)
    if not is_base64:
        return data
    data = data.translate(None, _WHITESPACE)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise errors.InvalidArgument(field, f"malformed base64: {error}") from None


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
            probe_video(data, VideoLimits(max_pixels=max_pixels))
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(source.field, error.description) from None
