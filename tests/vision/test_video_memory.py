"""What a long video costs the encoder's process: no more than a short one."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from processes import memory_bytes
from vision.test_service import Process, header

from chiasm.model.synth import synthesize
from chiasm.types import MediaKind
from chiasm.v1 import encoder_pb2

WIDTH, HEIGHT, RATE, BITS_PER_S = 320, 240, 25, 4_000_000
MAX_FRAMES = 48
MIB = 1 << 20
CHUNK_BYTES = 256 * 1024

MAX_PASS_BYTES = 32 * MIB
"""Of what does not grow with the video: one pass of the ViT, one frame, buffers on the way."""

MAX_DIFFERENCE_BYTES = 20 * MIB
"""Between a long and a short video with as many frames taken; the long one's file is larger."""


def noisy_mp4(num_frames: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (2 * HEIGHT, WIDTH, 3), dtype=np.uint8)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = BITS_PER_S
        for i in range(num_frames):
            top = i * 7 % HEIGHT
            frame = av.VideoFrame.from_ndarray(noise[top : top + HEIGHT].copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("long")
    checkpoint = folder / "tiny"
    synthesize(checkpoint)
    settings = {"min_frames": 4, "max_frames": MAX_FRAMES}
    (checkpoint / "video_preprocessor_config.json").write_text(json.dumps(settings))
    flags = ("--dtype=float32", "--max-batch-patches=2400", "--max-memory-bytes=1000000")
    running = Process(checkpoint, folder / "stderr", *flags)
    yield running
    assert running.stop() == 0, running.log.read_text()


def paced(data: bytes) -> Iterator[Any]:
    """An upload no faster than it is taken: what HTTP/2 lets a sender be ahead is not the point.
    A busy machine may stop the encoder for a while, and grpc's windows grow with the rate."""
    yield header(data, MediaKind.VIDEO)
    for start in range(0, len(data), CHUNK_BYTES):
        time.sleep(0.02)
        yield encoder_pb2.EncodeRequest(chunk=data[start : start + CHUNK_BYTES])


def peak_bytes(process: Process) -> int:
    return memory_bytes(process.popen.pid, "VmHWM")


def test_peak_memory_does_not_grow_with_the_length(process: Process) -> None:
    process.encode(paced(noisy_mp4(4)))
    before = peak_bytes(process)
    short, long = noisy_mp4(MAX_FRAMES + 2), noisy_mp4(2000)
    result = process.encode(paced(short))
    after_short = peak_bytes(process)
    assert result.grid.t == MAX_FRAMES
    taken_bytes = result.grid.t * result.grid.h * result.grid.w * 3 * 14 * 14
    assert after_short - before < taken_bytes + MAX_PASS_BYTES < 4 * taken_bytes
    assert process.encode(paced(long)).grid == result.grid
    assert peak_bytes(process) - after_short < MAX_DIFFERENCE_BYTES < len(long) - len(short)
