"""The same-host lane: packets over a Unix domain socket, payloads in arenas.

Engine thread and compute thread talk to each other directly, with one system call each way and no
event loop in between. The protocol is in docs/expert-protocol.md. Sockets are in the abstract
namespace: like the arenas they leave nothing behind, and processes of another network namespace,
as in another pod, do not reach them.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import uuid
from pathlib import Path

from chiasm.v1 import experts_pb2

MAX_PACKET_BYTES = 1 << 16
"""Bound of a packet: it carries no payload, only shards, shapes and trace context."""

NUM_DESCRIPTORS = 2

_BACKLOG = 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def is_supported() -> bool:
    """Whether this system has what a lane needs: Linux."""
    return sys.platform == "linux" and _BOOT_ID.exists()


def boot_id() -> str:
    """Names this run of this host's kernel."""
    return _BOOT_ID.read_text().strip()


def listen() -> tuple[socket.socket, str]:
    """A listening socket, not blocking, and its name."""
    name = f"chiasm-{uuid.uuid4().hex}"
    listening = _socket()
    listening.bind(_address(name))
    listening.listen(_BACKLOG)
    return listening, name


def connect(name: str) -> socket.socket:
    """A socket connected to a listening one. Raises OSError."""
    connected = _socket()
    try:
        connected.connect(_address(name))
    except OSError:
        connected.close()
        raise
    return connected


def is_own_user(connected: socket.socket) -> bool:
    """Whether the peer runs as the user that this process runs as."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(packed)[1] == os.getuid())


def send_hello(
    connected: socket.socket, hello: experts_pb2.LaneHello, descriptors: list[int]
) -> None:
    """The first packet. Raises OSError."""
    socket.send_fds(connected, [hello.SerializeToString()], descriptors)


def receive_hello(connected: socket.socket) -> tuple[bytes, list[int]]:
    """The first packet and its descriptors, which the caller must close. Raises OSError."""
    packet, descriptors, _, _ = socket.recv_fds(
        connected, MAX_PACKET_BYTES, NUM_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    return packet, descriptors


def _socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    created.setblocking(False)
    return created


def _address(name: str) -> bytes:
    return b"\0" + name.encode()
