"""The lane of an expert server as a process: what it takes, what it refuses, what it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from expert_pool.test_service import (
    LAYER,
    MODULE,
    TIMEOUT_S,
    Stub,
    await_serving,
    dispatch,
    request,
    tokens,
)
from google.rpc import code_pb2
from processes import ServiceProcess, running

from chiasm.model.config import ModelConfig
from chiasm.transport import lane, shared_memory, tensors
from chiasm.transport.shared_memory import Arena, Region
from chiasm.v1 import common_pb2, experts_pb2, tensor_pb2

ARENA_BYTES = 1 << 20
HALF = ARENA_BYTES // 2

pytestmark = pytest.mark.skipif(not lane.is_supported(), reason="lanes need Linux")


class Lane:
    """A peer's end, made by hand."""

    def __init__(self, offer: experts_pb2.LaneOffer) -> None:
        self.socket = lane.connect(offer.socket)
        self.socket.setblocking(True)
        self.socket.settimeout(TIMEOUT_S)
        descriptors = [shared_memory.create(ARENA_BYTES) for _ in range(2)]
        self.requests = Arena(descriptors[0], ARENA_BYTES, is_writable=True)
        self.answers = Arena(descriptors[1], ARENA_BYTES, is_writable=False)
        hello = experts_pb2.LaneHello(request_bytes=ARENA_BYTES, answer_bytes=ARENA_BYTES)
        lane.send_hello(self.socket, hello, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        assert experts_pb2.LaneWelcome.FromString(self.socket.recv(1024)).process_id > 0

    def request(
        self, config: ModelConfig, num_tokens: int, seed: int, **fields: object
    ) -> experts_pb2.DispatchRequest:
        """A dispatch in the first half of the arena of requests."""
        region = Region(self.requests, 0, HALF)
        hidden, ids, weights = (
            tensors.to_wire(t, region) for t in tokens(config, num_tokens, seed)
        )
        values: dict[str, object] = {
            "dispatch_id": seed,
            "modality": common_pb2.MODALITY_TEXT,
            "layer": LAYER,
            "shards": [1, 3],
            "num_shards": 4,
            "hidden": hidden,
            "expert_ids": ids,
            "expert_weights": weights,
            "timeout_ns": 10**10,
            "sent_ns": time.monotonic_ns(),
            "answer_region": tensor_pb2.SharedRegion(offset=HALF, length=HALF),
        }
        return experts_pb2.DispatchRequest(**{**values, **fields})  # type: ignore[arg-type]

    def ask(self, sent: experts_pb2.DispatchRequest) -> experts_pb2.DispatchResponse:
        self.socket.send(sent.SerializeToString())
        return experts_pb2.DispatchResponse.FromString(self.socket.recv(lane.MAX_PACKET_BYTES))


def offered(stub: Stub) -> experts_pb2.LaneOffer:
    description = stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)
    assert description.lane.boot_id == lane.boot_id()
    return description.lane


def num_arenas(process: ServiceProcess) -> int:
    maps = Path(f"/proc/{process.process.pid}/maps").read_text()
    return maps.count("memfd:chiasm-arena")


def await_arenas(process: ServiceProcess, count: int) -> None:
    end = time.monotonic() + TIMEOUT_S
    while num_arenas(process) != count:
        assert time.monotonic() < end, f"{num_arenas(process)} arenas are mapped, not {count}"
        time.sleep(0.02)


@contextmanager
def lane_to(stub: Stub) -> Iterator[Lane]:
    opened = Lane(offered(stub))
    try:
        yield opened
    finally:
        opened.socket.close()


def test_the_lane_gives_the_bits_of_the_stream(stub: Stub, config: ModelConfig) -> None:
    with lane_to(stub) as opened:
        for seed, num_tokens in ((1, 1), (2, 17), (3, 64)):
            by_stream = dispatch(stub, [request(config, num_tokens=num_tokens, seed=seed)])[1]
            by_lane = opened.ask(opened.request(config, num_tokens, seed))
            assert by_lane.dispatch_id == seed
            for mine, theirs in zip(
                by_lane.partials.shards, by_stream.partials.shards, strict=True
            ):
                assert not mine.values.data
                assert mine.values.shared.offset >= HALF
                assert mine.values.crc32c == theirs.values.crc32c
                for name in ("rows", "values"):
                    assert torch.equal(
                        tensors.from_wire(getattr(mine, name), name=name, arena=opened.answers),
                        tensors.from_wire(getattr(theirs, name), name=name),
                    )


def damaged(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    opened.requests.write(sent.hidden.shared.offset, np.zeros(4, dtype=np.uint8))


def outside(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    sent.hidden.shared.offset = ARENA_BYTES - 8


def far_outside(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    sent.hidden.shared.offset = 2**64 - 1


def no_room(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    sent.answer_region.length = 100


def answer_outside(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    sent.answer_region.offset = 2**64 - 1


def not_the_shape(opened: Lane, sent: experts_pb2.DispatchRequest) -> None:
    sent.hidden.shape[0] += 1


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (damaged, code_pb2.DATA_LOSS),
        (outside, code_pb2.DATA_LOSS),
        (far_outside, code_pb2.DATA_LOSS),
        (no_room, code_pb2.INVALID_ARGUMENT),
        (answer_outside, code_pb2.INVALID_ARGUMENT),
        (not_the_shape, code_pb2.INVALID_ARGUMENT),
    ],
)
def test_what_does_not_fit_is_refused_and_the_lane_goes_on(
    stub: Stub,
    config: ModelConfig,
    spoil: Callable[[Lane, experts_pb2.DispatchRequest], None],
    code: int,
) -> None:
    with lane_to(stub) as opened:
        sent = opened.request(config, 5, seed=1)
        spoil(opened, sent)
        assert opened.ask(sent).error.code == code
        assert opened.ask(opened.request(config, 5, seed=2)).HasField("partials")


def unsealed() -> int:
    descriptor = os.memfd_create("unsealed")
    os.ftruncate(descriptor, ARENA_BYTES)
    return descriptor


@pytest.mark.parametrize(
    ("hello", "make"),
    [
        (b"\xff\xff\xff", shared_memory.create),
        (None, lambda _: unsealed()),
        (None, lambda num_bytes: shared_memory.create(num_bytes // 2)),
        (None, lambda _: os.open("/dev/null", os.O_RDWR)),
        (None, None),
    ],
    ids=["no message", "not sealed", "too small", "not a memfd", "no descriptors"],
)
def test_a_bad_greeting_ends_the_lane_and_nothing_else(
    server: ServiceProcess,
    stub: Stub,
    config: ModelConfig,
    hello: bytes | None,
    make: Callable[[int], int] | None,
) -> None:
    packet = experts_pb2.LaneHello(request_bytes=ARENA_BYTES, answer_bytes=ARENA_BYTES)
    connected = lane.connect(offered(stub).socket)
    connected.setblocking(True)
    connected.settimeout(TIMEOUT_S)
    descriptors = [make(ARENA_BYTES), make(ARENA_BYTES)] if make is not None else []
    num_open = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    with connected:
        socket.send_fds(connected, [hello or packet.SerializeToString()], descriptors)
        assert connected.recv(1024) == b""
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(os.listdir(f"/proc/{server.process.pid}/fd")) <= num_open
    assert dispatch(stub, [request(config)])[1].HasField("partials")


def test_a_packet_that_is_no_message_ends_the_lane(stub: Stub, config: ModelConfig) -> None:
    with lane_to(stub) as opened:
        opened.socket.send(b"\xff\xff\xff")
        assert opened.socket.recv(1024) == b""
    assert dispatch(stub, [request(config)])[1].HasField("partials")


PEER = """
import sys, time
sys.path.insert(0, "tests")
from expert_pool.test_lane import Lane, ModelConfig
from chiasm.v1 import experts_pb2
from pathlib import Path
opened = Lane(experts_pb2.LaneOffer(socket=sys.argv[1]))
config = ModelConfig.load(Path(sys.argv[2]))
for seed in range(50):
    opened.socket.send(opened.request(config, 60, seed).SerializeToString())
    print("sent", flush=True)
time.sleep(60)
"""


def test_a_killed_decoder_leaves_nothing_behind(
    server: ServiceProcess, stub: Stub, config: ModelConfig, tiny_checkpoint: Path
) -> None:
    await_arenas(server, 0)
    for _ in range(3):
        offer = offered(stub)
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER, offer.socket, str(tiny_checkpoint)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"sent\n"
        assert num_arenas(server) == 2
        peer.send_signal(signal.SIGKILL)
        peer.wait()
        peer.stdout.close()
        await_arenas(server, 0)
    assert dispatch(stub, [request(config)])[1].HasField("partials")


def test_a_killed_server_leaves_nothing_behind(tiny_checkpoint: Path, config: ModelConfig) -> None:
    flags = ("--model", str(tiny_checkpoint), "--modality", "text", "--dtype", "float32")
    with ExitStack() as until_end:
        process = until_end.enter_context(running(MODULE, *flags, "--shards", "1,3/4"))
        channel = until_end.enter_context(grpc.insecure_channel(process.address))
        await_serving(channel)
        offer = offered(Stub(channel))
        opened = Lane(offer)
        assert opened.ask(opened.request(config, 3, seed=1)).HasField("partials")
        process.process.kill()
        process.process.wait()
        assert opened.socket.recv(1024) == b""
        opened.socket.close()
        with pytest.raises(ConnectionRefusedError):
            lane.connect(offer.socket)
        until_end.pop_all()  # which would ask it to end well
