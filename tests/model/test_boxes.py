"""Headers of MP4 files that declare far more than there is, and files that only look like such."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from model.mp4_boxes import Change, box, changed, table

from chiasm.errors import InvalidArgument
from chiasm.model.boxes import MAX_SAMPLES, check_boxes
from chiasm.model.probe import VideoInfo, VideoLimits, probe_video

HUGE = 170_000_000
INFO = VideoInfo(width=64, height=48, num_frames=3, fps=10.0)


def movie(
    *, container: str = "mp4", sound: str = "", options: dict[str, str] | None = None
) -> bytes:
    """Three frames, with a second of sound if its codec is given."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as out:
        stream: Any = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = INFO.width, INFO.height, "yuv420p"
        track: Any = out.add_stream(sound, rate=48_000, layout="mono") if sound else None
        for level in range(3):
            picture = np.full((INFO.height, INFO.width, 3), 40 * level, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
        if track is not None:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 48_000), np.int16), format="s16", layout="mono"
            )
            silence.rate = 48_000
            out.mux(track.encode(silence))
            out.mux(track.encode())
    return file.getvalue()


TABLES = {
    b"stsz": table(1, HUGE),
    b"stsc": table(1, 1, HUGE, 1),
    b"stts": table(1, HUGE, 1),
}
"""Of one table each, so that a kilobyte is enough."""

SOUND = struct.pack(">III4s", 0, 0, 0, b"hdlr") + struct.pack(">II4s", 0, 0, b"soun")


@pytest.mark.parametrize(
    ("container", "sound", "options"),
    [
        ("mp4", "", {}),
        ("mp4", "aac", {}),
        ("mov", "pcm_s16le", {}),
        ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_sound_films_are_opened(container: str, sound: str, options: dict[str, str]) -> None:
    found = probe_video(movie(container=container, sound=sound, options=options), VideoLimits())
    assert (found.width, found.height, found.fps) == (INFO.width, INFO.height, INFO.fps)
    assert found.num_frames in (3, None)


def test_an_hour_of_plain_sound_is_not_too_much() -> None:
    """172 million samples, of which FFmpeg makes an entry for some hundreds at a time."""
    hour = 3600 * 48_000
    plain = movie(container="mov", sound="pcm_s16le")
    tracks = []

    def long(body: bytes) -> bytes:
        tracks.append(body)
        if b"vide" in body:
            return body
        tables = {
            b"stsz": table(2, hour),
            b"stsc": table(1, 1, hour, 1),
            b"stts": table(1, hour, 1),
        }
        return changed(body, tables)

    check_boxes(io.BytesIO(changed(plain, {b"trak": long})))
    assert len(tracks) == 2


@pytest.mark.parametrize(
    "changes",
    [
        TABLES,
        {**TABLES, b"stbl": lambda body: body + box(b"udta", SOUND)},
        {**TABLES, b"stsd": lambda body: body + box(b"stsz", table(1, HUGE)(b"")), b"stsz": bytes},
        {b"stsz": table(0, HUGE)},
        {b"stz2": table(4, HUGE), b"stsz": table(4, HUGE)},
        {b"edts": lambda _: box(b"elst", table(1 + MAX_SAMPLES // 3)(b""))},
        {b"trak": lambda body: body + box(b"elst", table(HUGE)(b""))},
        {b"moov": lambda body: body + box(b"trun", table(HUGE)(b""))},
    ],
    ids=["constant", "as sound", "in stsd", "table", "stz2", "edits", "stray edits", "fragment"],
)
def test_more_samples_than_there_can_be_are_refused(changes: dict[bytes, Change]) -> None:
    with pytest.raises(InvalidArgument, match="declares more than 4000000 samples") as error:
        probe_video(changed(movie(), changes), VideoLimits())
    assert error.value.field == "video"


def test_what_hides_the_header_is_refused() -> None:
    bomb = changed(movie(), TABLES)
    hidden = changed(bomb, {b"moov": lambda body: box(b"moov", body)}).replace(b"moov", b"free", 1)
    for data in (hidden, bomb.replace(b"ftyp", b"what", 1), b"\0\0\0\x08what" + bomb):
        with pytest.raises(InvalidArgument):
            probe_video(data, VideoLimits())
    with pytest.raises(InvalidArgument, match="compressed header"):
        probe_video(changed(movie(), {b"moov": lambda body: box(b"cmov", body)}), VideoLimits())


@pytest.mark.parametrize("kind", [b"free", b"trak", b"stsz"])
def test_boxes_without_end_are_refused(kind: bytes) -> None:
    many = box(kind, b"\0" * 12 if kind == b"stsz" else b"") * 100_001
    for data in (movie() + many, changed(movie(), {b"moov": lambda body: body + many})):
        with pytest.raises(InvalidArgument, match="more than 100000"):
            probe_video(data, VideoLimits())


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """In a process of its own, as the peak is one of processes."""
    path = tmp_path / "bomb.mp4"
    path.write_bytes(changed(movie(), TABLES))
    code = f"""
import os, pathlib
from chiasm.errors import InvalidArgument
from chiasm.model.probe import VideoLimits, probe_video
from processes import memory_bytes
data, before = pathlib.Path({str(path)!r}).read_bytes(), memory_bytes(os.getpid(), "VmHWM")
try:
    probe_video(data, VideoLimits())
except InvalidArgument:
    print(memory_bytes(os.getpid(), "VmHWM") - before)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 64 << 20
