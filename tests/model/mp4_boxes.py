"""MP4 files with some of their boxes changed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")

Change = Callable[[bytes], bytes]


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def changed(data: bytes, changes: dict[bytes, Change]) -> bytes:
    """The file with what some boxes hold changed; of those that hold boxes, the outcome."""
    out = b""
    for kind, body in boxes(data):
        inner = changed(body, changes) if kind in CONTAINERS else body
        out += box(kind, changes[kind](inner) if kind in changes else inner)
    return out


def table(*numbers: int) -> Change:
    return lambda _: struct.pack(f">I{len(numbers)}I", 0, *numbers)
