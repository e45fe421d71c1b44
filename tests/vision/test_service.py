"""The vision encoder as a real process, over grpc."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from chiasm import errors
from chiasm.model.synth import synthesize
from chiasm.services.vision_encoder.config import EncoderSettings
from chiasm.services.vision_encoder.model import VisionModel
from chiasm.services.vision_encoder.servicer import FETCH_CHUNK_BYTES
from chiasm.transport import status, tensors
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc

MAX_ERROR = 1e-5
"""Between two processes with the same weights; their kernels may split the work differently."""

MAX_MEDIA_BYTES = 1 << 20
CACHE_BYTES = 1_800_000
CALL_S = 60
KINDS = {
    MediaKind.IMAGE: common_pb2.MEDIA_KIND_IMAGE,
    MediaKind.VIDEO: common_pb2.MEDIA_KIND_VIDEO,
}


def png(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def mp4(num_frames: int, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(num_frames):
            pixels = generator.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def digest_of(data: bytes, kind: MediaKind = MediaKind.IMAGE) -> str:
    return hashlib.sha256(kind.value.encode() + b"\0" + data).hexdigest()


def header(data: bytes, kind: MediaKind = MediaKind.IMAGE, **changes: Any) -> Any:
    fields = {"digest": digest_of(data, kind), "kind": KINDS[kind], "size_bytes": len(data)}
    return encoder_pb2.EncodeRequest(header=encoder_pb2.EncodeHeader(**(fields | changes)))


def upload(data: bytes, kind: MediaKind = MediaKind.IMAGE, **changes: Any) -> Iterator[Any]:
    yield header(data, kind, **changes)
    for start in range(0, len(data), 10_000):
        yield encoder_pb2.EncodeRequest(chunk=data[start : start + 10_000])


class Process:
    """`python -m chiasm.services.vision_encoder` on a free port, without an orchestrator."""

    def __init__(self, checkpoint: Path, log: Path, *flags: str) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "chiasm.services.vision_encoder", *flags],
                env=os.environ | {"CHIASM_MODEL": str(checkpoint), "OMP_NUM_THREADS": "2"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("listening "), log.read_text()
        self.channel = grpc.insecure_channel(line.split()[1])
        self.stub = encoder_pb2_grpc.VisionEncoderStub(self.channel)
        self._wait_serving()

    def encode(self, parts: Iterable[Any]) -> Any:
        return self.stub.Encode(iter(parts), timeout=CALL_S)

    def fetch(self, digest: str) -> tuple[torch.Tensor, int]:
        """The embeddings and the number of chunks they came in."""
        parts: list[torch.Tensor] = []
        request = encoder_pb2.FetchRequest(digest=digest)
        for chunk in self.stub.Fetch(request, timeout=CALL_S):
            assert chunk.row_offset == sum(map(len, parts))
            assert len(chunk.rows.data) <= FETCH_CHUNK_BYTES
            parts.append(tensors.from_wire(chunk.rows, name="rows"))
            total_rows = chunk.total_rows
        whole = torch.cat(parts)
        assert len(whole) == total_rows
        return whole, len(parts)

    def refusal(self, parts: Iterable[Any]) -> errors.ChiasmError:
        with pytest.raises(grpc.RpcError) as caught:
            self.encode(parts)
        return status.from_rpc_error(caught.value)

    def stop(self) -> int:
        self.channel.close()
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout=20)

    def _wait_serving(self) -> None:
        health = health_pb2_grpc.HealthStub(self.channel)
        end = time.monotonic() + CALL_S
        while time.monotonic() < end:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            assert self.popen.poll() is None, self.log.read_text()
            time.sleep(0.05)
        pytest.fail(self.log.read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "tiny"
    synthesize(path, preset="tiny", seed=11)
    return path


@pytest.fixture(scope="module")
def process(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(
        checkpoint,
        tmp_path_factory.mktemp("log") / "stderr",
        "--dtype=float32",
        f"--cache-bytes={CACHE_BYTES}",
        f"--max-media-bytes={MAX_MEDIA_BYTES}",
        "--max-image-pixels=1000000",
    )
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> VisionModel:
    return VisionModel.load(EncoderSettings(model=checkpoint, dtype="float32"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (png(90, 130, 1), MediaKind.IMAGE),
        (png(333, 60, 2), MediaKind.IMAGE),
        (mp4(6, 3), MediaKind.VIDEO),
        (mp4(17, 4), MediaKind.VIDEO),
    ],
)
def test_embeddings_equal_the_model_in_process(
    process: Process, model: VisionModel, data: bytes, kind: MediaKind
) -> None:
    result = process.encode(upload(data, kind))
    patches = model.preprocess(io.BytesIO(data), kind, lambda: None)
    assert (result.grid.t, result.grid.h, result.grid.w) == patches.grid
    assert patches.grid == model.plan(io.BytesIO(data), kind).grid
    assert (result.digest, result.cached) == (digest_of(data, kind), False)
    assert result.preprocess_ns > 0
    assert result.compute_ns > 0

    embeddings, num_chunks = process.fetch(result.digest)
    assert len(embeddings) == result.num_tokens == model.embedding_bytes(patches.grid) // 512
    assert num_chunks == -(-embeddings.nbytes // FETCH_CHUNK_BYTES)
    torch.testing.assert_close(embeddings, model.embed(patches), rtol=0, atol=MAX_ERROR)


def test_long_videos_take_several_passes(checkpoint: Path, model: VisionModel) -> None:
    settings = EncoderSettings(model=checkpoint, dtype="float32", max_batch_patches=1)
    patches = model.preprocess(io.BytesIO(mp4(5, 12)), MediaKind.VIDEO, lambda: None)
    assert patches.grid.t == 6
    in_passes = VisionModel.load(settings).embed(patches)
    torch.testing.assert_close(in_passes, model.embed(patches), rtol=0, atol=MAX_ERROR)


def test_second_encode_is_answered_after_the_header(process: Process) -> None:
    data = png(64, 64, 5)
    first = process.encode(upload(data))
    answered = threading.Event()

    def header_alone() -> Iterator[Any]:
        yield header(data)
        answered.wait(CALL_S)

    second = process.encode(header_alone())
    answered.set()
    assert (first.cached, second.cached) == (False, True)
    assert (second.grid, second.num_tokens) == (first.grid, first.num_tokens)
    assert second.compute_ns == 0


GOOD = png(56, 56, 6)
BROKEN = png(300, 300, 7)[:2000]


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        (list(upload(GOOD, digest=digest_of(b"other"))), "header.digest"),
        (list(upload(GOOD, size_bytes=len(GOOD) + 1)), "chunk"),
        (list(upload(GOOD))[:1], "chunk"),
        (list(upload(GOOD, size_bytes=MAX_MEDIA_BYTES + 1)), "header.size_bytes"),
        (list(upload(GOOD))[1:], "header"),
        ([], "header"),
        (list(upload(b"no image at all")), "image"),
        (list(upload(BROKEN)), "image"),
        (list(upload(png(1001, 1000, 8)[:50_000])), "image"),
        (list(upload(GOOD, MediaKind.VIDEO)), "video"),
        (list(upload(mp4(4, 9)[:-400], MediaKind.VIDEO)), "video"),
    ],
)
def test_bad_media_is_refused_and_serving_goes_on(
    process: Process, parts: list[Any], field: str
) -> None:
    error = process.refusal(parts)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == field
    assert process.encode(upload(png(58, 56, 10))).num_tokens > 0


def test_evicted_and_unknown_embeddings_are_not_found(process: Process) -> None:
    first = process.encode(upload(png(448, 448, 20)))
    assert first.num_tokens * 512 * 14 > CACHE_BYTES
    for seed in range(21, 35):
        process.encode(upload(png(448, 448, seed)))
    for digest in (first.digest, digest_of(b"never seen")):
        with pytest.raises(grpc.RpcError) as caught:
            process.fetch(digest)
        error = status.from_rpc_error(caught.value)
        assert isinstance(error, errors.NotFound)
        assert error.reason == "EMBEDDING_EVICTED"
    load = process.stub.GetLoad(encoder_pb2.GetEncoderLoadRequest(), timeout=CALL_S)
    assert (load.queued_items, load.queued_patches) == (0, 0)
    assert 0 < load.cache_bytes <= CACHE_BYTES
    assert load.encoded_patches >= 15 * 32 * 32


def test_concurrent_encodes_of_one_item_agree(process: Process) -> None:
    data = png(560, 560, 40)
    before = process.stub.GetLoad(encoder_pb2.GetEncoderLoadRequest(), timeout=CALL_S)
    calls = [process.stub.Encode.future(upload(data), timeout=CALL_S) for _ in range(6)]
    results = [call.result() for call in calls]
    after = process.stub.GetLoad(encoder_pb2.GetEncoderLoadRequest(), timeout=CALL_S)
    assert {result.num_tokens for result in results} == {400}
    assert after.encoded_patches - before.encoded_patches == 1600


def test_bfloat16_embeddings_travel_as_bfloat16(
    checkpoint: Path, model: VisionModel, tmp_path: Path
) -> None:
    data = png(90, 130, 1)
    process = Process(checkpoint, tmp_path / "stderr", "--max-batch-patches=1")
    try:
        embeddings, _ = process.fetch(process.encode(upload(data)).digest)
    finally:
        code = process.stop()
    expected = model.embed(model.preprocess(io.BytesIO(data), MediaKind.IMAGE, lambda: None))
    assert code == 0
    assert embeddings.dtype == torch.bfloat16
    assert (embeddings.float() - expected).abs().mean() < 0.02


def test_checkpoint_without_weights_ends_the_process(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    command = [sys.executable, "-m", "chiasm.services.vision_encoder", f"--model={bare}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "model.safetensors" in ended.stderr
