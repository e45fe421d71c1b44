"""The decoder's end of a same-host lane: slots, packets, and how a lane is opened."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from chiasm import errors
from chiasm.services.decoder.calls import Call
from chiasm.transport import lane, shared_memory
from chiasm.transport.shared_memory import Arena, Arenas, Region, Slots
from chiasm.v1 import experts_pb2

NUM_SLOTS = 4
"""Dispatches on a lane at once: two micro-batches, and two that nobody waits for any more. One more
goes over the stream."""

WELCOME_TIMEOUT_S = 10.0
"""The server welcomes a lane between two dispatches; meanwhile the stream is used."""


class Lane:
    """An open lane. Used on the engine's thread."""

    def __init__(self, connected: socket.socket, arenas: Arenas) -> None:
        self._socket, self._arenas = connected, arenas
        self._requests = Slots(NUM_SLOTS, arenas.requests.num_bytes // NUM_SLOTS)
        self._answer_bytes = arenas.answers.num_bytes // NUM_SLOTS
        self._in_use: dict[int, int] = {}  # dispatch_id -> slot's offset in the requests

    @property
    def descriptor(self) -> int:
        return self._socket.fileno()

    def send(self, call: Call) -> bool:
        """Sends a call's dispatch; False when the lane has no room for it now.

        Raises Unavailable when the server is gone.
        """
        slot_bytes = self._requests.num_bytes
        if call.request_bytes > slot_bytes or call.answer_bytes > self._answer_bytes:
            return False
        slot = self._requests.take()
        if slot is None:
            return False
        region = Region(self._arenas.requests, slot, slot_bytes)
        request = call.request(region)
        request.answer_region.offset = slot // slot_bytes * self._answer_bytes
        request.answer_region.length = self._answer_bytes
        request.sent_ns = time.monotonic_ns()
        try:
            self._socket.send(request.SerializeToString())
        except BlockingIOError:
            self._requests.give_back(slot)
            return False
        except OSError as error:
            raise errors.Unavailable(f"the lane is broken: {error}") from None
        self._in_use[request.dispatch_id] = slot
        return True

    def receive(self, on_answer: Callable[[experts_pb2.DispatchResponse, Arena], None]) -> None:
        """Takes an answer that has arrived; its slot is free again once `on_answer` returns.

        Raises Unavailable when the server is gone.
        """
        try:
            packet = self._socket.recv(lane.MAX_PACKET_BYTES)
            if not packet:
                raise errors.Unavailable("the server ended the lane")
            response = experts_pb2.DispatchResponse.FromString(packet)
        except BlockingIOError:
            return
        except (OSError, DecodeError) as error:
            raise errors.Unavailable(f"the lane is broken: {error}") from None
        try:
            on_answer(response, self._arenas.answers)
        finally:
            slot = self._in_use.pop(response.dispatch_id, None)
            if slot is not None:
                self._requests.give_back(slot)

    def close(self) -> None:
        """Ends the lane."""
        self._socket.close()


async def open_lane(offer: experts_pb2.LaneOffer, *, slot_bytes: int) -> Lane:
    """Connects and hands the arenas over, each with room for NUM_SLOTS times `slot_bytes`.

    Raises Unavailable where the offer cannot be used: another host, another network namespace,
    another user, no memory, no welcome in time.
    """
    if not lane.is_supported() or offer.boot_id != lane.boot_id():
        raise errors.Unavailable("the server is on another host")
    num_bytes = NUM_SLOTS * slot_bytes
    if num_bytes > offer.max_arena_bytes:
        raise errors.Unavailable("the server maps smaller arenas")
    try:
        connected = lane.connect(offer.socket)
    except OSError as error:
        raise errors.Unavailable(f"the server's socket cannot be reached: {error}") from None
    try:
        arenas = _hand_over(connected, num_bytes)
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            welcome = await asyncio.get_running_loop().sock_recv(connected, lane.MAX_PACKET_BYTES)
        if not welcome:
            raise errors.Unavailable("the server refused the lane")
    except (OSError, TimeoutError) as error:
        connected.close()
        raise errors.Unavailable(f"no lane: {error!r}") from None
    except BaseException:
        connected.close()
        raise
    return Lane(connected, arenas)


def _hand_over(connected: socket.socket, num_bytes: int) -> Arenas:
    """Makes and maps both arenas and sends them. Raises OSError."""
    descriptors: list[int] = []
    try:
        for _ in range(lane.NUM_DESCRIPTORS):
            descriptors.append(shared_memory.create(num_bytes))
        arenas = Arenas(
            requests=Arena(descriptors[0], num_bytes, is_writable=True),
            answers=Arena(descriptors[1], num_bytes, is_writable=False),
        )
        hello = experts_pb2.LaneHello(request_bytes=num_bytes, answer_bytes=num_bytes)
        lane.send_hello(connected, hello, descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return arenas
