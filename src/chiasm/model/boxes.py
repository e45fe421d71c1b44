"""What the headers of an MP4 or QuickTime file would make FFmpeg allocate, judged before it does.

Its demuxer makes an entry for every sample that a header declares, before anything can be refused:
a file of 1 kB may declare 170 million of them and take 4 GB. FFmpeg reads these boxes almost
wherever they are nested, so each place of a header that it could take for one counts as one.
Source of the layouts: ISO/IEC 14496-12, sections 8.6 to 8.8.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from chiasm.errors import InvalidArgument

MAX_SAMPLES = 4_000_000
"""Most samples of all tracks together, about 100 MB; an hour of sound has 0.2 million."""

MAX_HEADER_BYTES = 64 << 20
"""Of one box outside the media data."""

MAX_BOXES = 100_000
"""Of one level, and of tables in a track."""

_FIRST = frozenset(
    b"ftyp styp moov moof mdat wide free skip junk pnot pict prfl udta uuid sidx emsg".split()
)
_MEDIA = b"mdat"
_TABLES = re.compile(rb"stsz|stz2|stsc|stco|co64|stts|elst|trun|hdlr|cmov")
_SOUND, *_BESIDE_SOUND = (int.from_bytes(kind, "big") for kind in (b"soun", b"alis", b"url "))
"""Kinds of handlers, as the tables are read; the latter two tell where sound has its data."""

_PCM_GROUP = 512
"""At least so many samples of uncompressed sound get one entry together."""


class _Box(NamedTuple):
    kind: bytes
    start: int
    """Of what it holds."""
    end: int


def is_boxed(file: BinaryIO) -> bool:
    """Whether the file begins as MP4 and QuickTime files do."""
    file.seek(0)
    return file.read(8)[4:] in _FIRST


def check_boxes(file: BinaryIO) -> None:
    """Raises InvalidArgument("video") for headers that declare too much."""
    num_samples = 0
    for box in _boxes(file, 0, file.seek(0, 2)):
        if box.kind == _MEDIA:
            continue
        if box.end - box.start > MAX_HEADER_BYTES:
            raise InvalidArgument("video", f"has a header above {MAX_HEADER_BYTES} bytes")
        tracks = [b for b in _boxes(file, box.start, box.end) if b.kind == b"trak"]
        edges = [box.start, *itertools.chain(*((t.start, t.end) for t in tracks)), box.end]
        for start, end in itertools.pairwise(edges):  # the tracks, and what is between them
            file.seek(start)
            num_samples += _num_samples(file.read(end - start))
            if num_samples > MAX_SAMPLES:
                raise InvalidArgument("video", f"declares more than {MAX_SAMPLES} samples")


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[_Box]:
    """Boxes from `start` on, the last one cut off at `end`."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        file.seek(start)
        size, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        head, size = (16, large) if size == 1 else (8, size or end - start)
        if size < head:
            return  # damaged: FFmpeg does not go on either
        yield _Box(kind, min(start + head, end), min(start + size, end))
        start += size
    raise InvalidArgument("video", f"has more than {MAX_BOXES} boxes in a row")


def _num_samples(header: bytes) -> int:
    """Entries that FFmpeg makes for the tables of one track, or of one fragment."""
    tables = _tables(header)
    num_samples = sum(count for _, count, _ in tables[b"stsz"] + tables[b"stz2"])
    if _is_pcm(tables):
        num_chunks = sum(entries for entries, _, _ in tables[b"stco"] + tables[b"co64"])
        num_samples = num_chunks * (_most_in_chunk(header) // _PCM_GROUP + 1)
    # Every edit may take all samples once more.
    num_edits = sum(entries for entries, _, _ in tables[b"elst"])
    return num_samples * max(1, num_edits) + sum(count for count, _, _ in tables[b"trun"])


def _tables(header: bytes) -> Mapping[bytes, list[tuple[int, ...]]]:
    """The first three numbers of each table, behind version and flags."""
    tables: dict[bytes, list[tuple[int, ...]]] = defaultdict(list)
    for number, found in enumerate(_TABLES.finditer(header)):
        if found[0] == b"cmov":
            raise InvalidArgument("video", "has a compressed header")
        if number == MAX_BOXES:
            raise InvalidArgument("video", f"has more than {MAX_BOXES} tables")
        fields = header[found.end() + 4 : found.end() + 16].ljust(12, b"\0")
        tables[found[0]].append(struct.unpack(">III", fields))
    return tables


def _is_pcm(tables: Mapping[bytes, list[tuple[int, ...]]]) -> bool:
    """Whether it is uncompressed sound: samples of one size that last one tick each."""
    kinds = {kind for _, kind, _ in tables[b"hdlr"]}
    return (
        _SOUND in kinds <= {_SOUND, *_BESIDE_SOUND}
        and [(entries, tick) for entries, _, tick in tables[b"stts"]] == [(1, 1)]
        and len(tables[b"stsc"]) == 1
        and all(size for size, _, _ in tables[b"stsz"])
        and not tables[b"stz2"]
    )


def _most_in_chunk(header: bytes) -> int:
    """Most samples of a chunk."""
    start = header.index(b"stsc") + 8
    (num_runs,) = struct.unpack(">I", header[start : start + 4].ljust(4, b"\0"))
    runs = header[start + 4 : start + 4 + 12 * num_runs]
    whole = struct.iter_unpack(">III", runs[: len(runs) // 12 * 12])
    return max((count for _, count, _ in whole), default=0)
