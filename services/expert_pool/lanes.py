"""The server's end of same-host lanes. Everything here runs on the compute thread."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError

from chiasm import errors
from chiasm.services.expert_pool.answers import Answers, Received
from chiasm.services.expert_pool.worker import Worker
from chiasm.transport import lane, shared_memory
from chiasm.transport.shared_memory import Arenas
from chiasm.v1 import experts_pb2

MAX_LANES = 64
"""Lanes open at once; a decoder beyond it uses its stream."""

MAX_UNREAD_NS = 60_000_000_000
"""No packet lies unread for so long: the server would have been taken for dead."""

ACCEPT_PAUSE_S = 1.0
"""For so long no lane is accepted after the process had no descriptor for one."""

log = structlog.get_logger()


class LaneServer:
    """Listens and keeps the lanes; `offer` tells decoders where."""

    def __init__(self, worker: Worker, answers: Answers, *, max_arena_bytes: int) -> None:
        self._worker, self._answers, self._max_arena_bytes = worker, answers, max_arena_bytes
        self._listening, name = lane.listen()
        self._is_listening = False
        self._lanes: set[ServerLane] = set()
        self.offer = experts_pb2.LaneOffer(
            boot_id=lane.boot_id(), socket=name, max_arena_bytes=max_arena_bytes
        )
        self._listen()

    def close(self) -> None:
        """Ends all lanes; dispatches that are on their way are repeated elsewhere."""
        self._pause()
        self._listening.close()
        for open_lane in tuple(self._lanes):
            open_lane.close()

    def _listen(self) -> None:
        if self._listening.fileno() >= 0:
            self._worker.watch(self._listening.fileno(), self._accept)
            self._is_listening = True

    def _pause(self) -> None:
        if self._is_listening:
            self._worker.unwatch(self._listening.fileno())
            self._is_listening = False

    def _accept(self) -> None:
        try:
            connected, _ = self._listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # Who knocks goes on to: the thread would do nothing but turn them away.
                log.warning("lane_not_accepted", error=str(error))
                self._pause()
                again = threading.Timer(ACCEPT_PAUSE_S, self._worker.submit, (self._listen,))
                again.daemon = True
                again.start()
            return  # otherwise it is gone again
        if len(self._lanes) >= MAX_LANES or not lane.is_own_user(connected):
            connected.close()
            return
        connected.setblocking(False)
        self._lanes.add(
            ServerLane(
                connected,
                self._worker,
                self._answers,
                max_arena_bytes=self._max_arena_bytes,
                on_close=self._lanes.discard,
            )
        )


class ServerLane:
    """One decoder's lane; a Caller."""

    def __init__(
        self,
        connected: socket.socket,
        worker: Worker,
        answers: Answers,
        *,
        max_arena_bytes: int,
        on_close: Callable[[ServerLane], None],
    ) -> None:
        self.is_gone = False
        self.arenas: Arenas | None = None
        self._socket, self._worker, self._answers = connected, worker, answers
        self._max_arena_bytes, self._on_close = max_arena_bytes, on_close
        worker.watch(connected.fileno(), self._readable)

    def answer(self, response: experts_pb2.DispatchResponse, held: int) -> None:
        """Sends a packet. A decoder has few dispatches under way, so its socket has room."""
        self._answers.gone(held)
        if self.is_gone:
            return
        try:
            self._socket.send(response.SerializeToString())
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Ends the lane, and with it the mappings."""
        if not self.is_gone:
            self.is_gone = True
            self.arenas = None
            self._worker.unwatch(self._socket.fileno())
            self._socket.close()
            self._on_close(self)

    def _readable(self) -> None:
        try:
            if self.arenas is None:
                self.arenas = self._shake_hands()
            elif packet := self._socket.recv(lane.MAX_PACKET_BYTES):
                self._receive(packet)
            else:
                self.close()
        except BlockingIOError:
            return
        except (OSError, DecodeError, errors.ChiasmError) as error:
            self._fail(error)
        except Exception as error:
            # Left open it would be read again, and fail again, for ever.
            log.exception("lane_defect")
            self._fail(error)

    def _receive(self, packet: bytes) -> None:
        request = experts_pb2.DispatchRequest.FromString(packet)
        now = time.monotonic_ns()
        # A clock of another time namespace is of no use, nor is none at all.
        unread_ns = now - request.sent_ns if request.sent_ns else -1
        is_sane = 0 <= unread_ns <= min(request.timeout_ns, MAX_UNREAD_NS)
        self._answers.submit(
            Received(
                request=request,
                caller=self,
                received_ns=request.sent_ns if is_sane else now,
                num_bytes=len(packet),
            )
        )

    def _shake_hands(self) -> Arenas:
        """Maps what the decoder hands over. Raises OSError, DecodeError or InvalidArgument."""
        packet, descriptors = lane.receive_hello(self._socket)
        try:
            if len(descriptors) != lane.NUM_DESCRIPTORS:
                raise errors.InvalidArgument("lane", "came without its arenas")
            hello = experts_pb2.LaneHello.FromString(packet)
            requests, answers = (
                shared_memory.open_received(
                    descriptor,
                    num_bytes,
                    max_bytes=self._max_arena_bytes,
                    is_writable=is_writable,
                )
                for descriptor, num_bytes, is_writable in (
                    (descriptors[0], hello.request_bytes, False),
                    (descriptors[1], hello.answer_bytes, True),
                )
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._socket.send(experts_pb2.LaneWelcome(process_id=os.getpid()).SerializeToString())
        return Arenas(requests=requests, answers=answers)

    def _fail(self, error: Exception) -> None:
        log.warning("lane_failed", error=str(error)[:256])
        self.close()
