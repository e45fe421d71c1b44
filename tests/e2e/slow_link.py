"""Carries packets between two TUN devices, late: slow_link.py FD FD.

Each line of its input, DELAY_MS LOSS DAMAGE, holds for the packets that come from then on.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import select
import socket
import sys
import time

MAX_PACKET_BYTES = 1 << 16
MAX_QUEUED = 1 << 12
"""More than this on their way, and packets are lost, as at any router."""
MIN_DATA_BYTES = 256
"""Before what is damaged: calls and answers of the orchestrator's have less."""


def main() -> None:
    """Until the input ends."""
    first, second = int(sys.argv[1]), int(sys.argv[2])
    delay_s = loss = damage = 0.0
    other = {first: second, second: first}
    dice = random.Random(0)
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable = select.select([0, *other], [], [], left_s)[0]
        if 0 in readable:
            readable.remove(0)
            lines = os.read(0, MAX_PACKET_BYTES).split(b"\n")
            if len(lines) == 1:
                return
            delay_ms, loss, damage = map(float, lines[-2].split())
            delay_s = delay_ms / 1000
        for device in readable:
            packet = os.read(device, MAX_PACKET_BYTES)
            if dice.random() < damage:
                packet = damaged(packet)
            if dice.random() >= loss and len(waiting) < MAX_QUEUED:
                waiting.append((time.monotonic() + delay_s, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # the device is down, or its queue is full
                os.write(device, packet)


def damaged(packet: bytes) -> bytes:
    """Two different words of a TCP payload that is large enough to be data change places: its
    checksum is a sum, and stays right."""
    tcp = 4 * (packet[0] & 15)
    if packet[9] != socket.IPPROTO_TCP or len(packet) < tcp + 20:
        return packet
    payload = tcp + 4 * (packet[tcp + 12] >> 4)
    for at in range(payload + MIN_DATA_BYTES, len(packet) - 3, 2):
        first, second = packet[at : at + 2], packet[at + 2 : at + 4]
        if first != second:
            return packet[:at] + second + first + packet[at + 4 :]
    return packet


if __name__ == "__main__":
    main()
