"""The compute thread and the lanes that it waits for, without processes."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from chiasm.services.expert_pool import lanes
from chiasm.services.expert_pool.answers import Received
from chiasm.services.expert_pool.worker import Worker
from chiasm.transport import lane
from chiasm.v1 import experts_pb2

WAIT_S = 20.0

on_linux = pytest.mark.skipif(not lane.is_supported(), reason="lanes need Linux")


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Not started yet."""
    made = Worker("experts")
    yield made
    made.close()


class Answers:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.received: list[Received] = []

    def submit(self, received: Received) -> None:
        self.received.append(received)


def test_the_thread_outlives_a_handler_and_a_job_that_fail(worker: Worker) -> None:
    read, write = os.pipe()
    failed, done = threading.Event(), threading.Event()

    def handler() -> None:
        os.read(read, 1)
        failed.set()
        raise RuntimeError("a defect")

    def job() -> None:
        raise RuntimeError("another")

    worker.watch(read, handler)
    worker.start()
    os.write(write, b"\0")
    assert failed.wait(WAIT_S)
    worker.submit(job)
    worker.submit(done.set)
    assert done.wait(WAIT_S)
    os.close(write)


@on_linux
def test_without_descriptors_lanes_are_accepted_later(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "ACCEPT_PAUSE_S", 0.05)
    server = lanes.LaneServer(worker, Answers(), max_arena_bytes=1)  # type: ignore[arg-type]  # a stand-in
    listening: Any = server._listening
    tried: list[float] = []

    class Full:
        """A process may open no more files, twice."""

        def accept(self) -> Any:
            tried.append(time.monotonic())
            if len(tried) < 3:
                raise OSError(errno.EMFILE, "too many open files")
            return listening.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(listening, name)

    server._listening = Full()  # type: ignore[assignment]  # a stand-in
    worker.start()
    with lane.connect(server.offer.socket) as connected:
        connected.setblocking(True)
        connected.settimeout(WAIT_S)
        connected.send(b"\xff")  # no greeting: whoever has accepted the lane ends it
        assert connected.recv(1) == b""
    assert len(tried) == 3
    worker.submit(server.close)


@on_linux
@pytest.mark.parametrize("sent_ns", [0, 1, 2**63])
def test_a_clock_that_cannot_be_right_is_not_gone_by(worker: Worker, sent_ns: int) -> None:
    answers = Answers()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    opened = lanes.ServerLane(
        ours,
        worker,
        answers,
        max_arena_bytes=1,
        on_close=lambda _: None,  # type: ignore[arg-type]  # a stand-in
    )
    before = time.monotonic_ns()
    request = experts_pb2.DispatchRequest(sent_ns=sent_ns, timeout_ns=2**64 - 1)
    opened._receive(request.SerializeToString())
    assert answers.received[0].received_ns >= before
    opened.close()
    theirs.close()
