"""Network namespaces with one link to this host, to be cut, slowed down, and cleaned up."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import pytest

from chiasm import forkserver

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NUMBERS = itertools.count()


def require_root() -> None:
    """Skips the test where namespaces cannot be made; in CI it fails instead."""
    reason = "network namespaces need root and the ip command"
    if os.geteuid() == 0 and Path("/dev/net/tun").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            name = _name()
            _ip("netns", "add", name)
            _ip("netns", "del", name)
            return
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A namespace and its link: `host` is this end's address, `address` the other's."""

    name: str
    device: str
    host: str
    address: str

    def run(self, work: Callable[[], T]) -> T:
        """Runs something inside; processes that it starts live there."""
        results: list[T] = []
        failures: list[BaseException] = []

        def inside() -> None:
            try:
                _enter(self.name)
                with patch.object(forkserver, "fork", lambda *_, **__: None):  # it is outside
                    results.append(work())
            except BaseException as error:
                failures.append(error)

        # A thread of its own: the namespace is a thread's, and ends with it.
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def cut(self) -> None:
        """From now on packets vanish, both ways, without a word to either end."""
        _ip("-n", self.name, "link", "set", self.device, "down")

    def mend(self) -> None:
        """Packets pass again."""
        _ip("-n", self.name, "link", "set", self.device, "up")


@contextmanager
def fast_network() -> Iterator[Network]:
    """A namespace behind a pair of virtual Ethernet devices."""
    with _namespace() as network:
        outside, inside = f"{network.device}o", network.device
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", network.name)
        try:
            _ip("addr", "add", f"{network.host}/30", "dev", outside)
            _ip("link", "set", outside, "up")
            _ip("-n", network.name, "addr", "add", f"{network.address}/30", "dev", inside)
            network.mend()
            yield network
        finally:
            _ip("link", "del", outside)


class Relay:
    """Carries packets between two descriptors, each after a while, or loses or damages it."""

    def __init__(self, ends: tuple[int, int]) -> None:
        program = str(Path(__file__).with_name("slow_link.py"))
        self._process = subprocess.Popen(
            [sys.executable, program, *map(str, ends)], pass_fds=ends, stdin=subprocess.PIPE
        )

    def become(self, *, delay_ms: float, loss: float = 0.0, damage: float = 0.0) -> None:
        """From now on every packet takes so long; these shares are lost, and damaged so that TCP's
        checksum does not tell. What is on its way arrives as it would have."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{delay_ms} {loss} {damage}\n".encode())
        self._process.stdin.flush()

    def stop(self) -> None:
        self._process.communicate()


@contextmanager
def slow_network(delay_ms: float) -> Iterator[tuple[Network, Relay]]:
    """A namespace behind a relay; it reaches every address of this host.

    The relay stands in for tc, whose netem is a module that few test machines' kernels have.
    """
    with _namespace() as network:
        outside = _tun(f"{network.device}o", network.host, network.address)
        inside = network.run(lambda: _tun(network.device, network.address, network.host))
        _ip("-n", network.name, "route", "add", "default", "dev", network.device)
        relay = Relay((outside, inside))
        try:
            relay.become(delay_ms=delay_ms)
            yield network, relay
        finally:
            relay.stop()
            os.close(outside)
            os.close(inside)


@contextmanager
def _namespace() -> Iterator[Network]:
    name = _name()
    third = os.getpid() % 250
    fourth = 4 * (next(_NUMBERS) % 60)
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield Network(
            name=name,
            device=f"d{name.removeprefix('chiasm-').replace('-', '')}"[:13],
            host=f"10.213.{third}.{fourth + 1}",
            address=f"10.213.{third}.{fourth + 2}",
        )
    finally:
        _ip("netns", "del", name)


def _name() -> str:
    return f"chiasm-{os.getpid()}-{next(_NUMBERS)}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _enter(name: str) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if _LIBC.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    finally:
        os.close(descriptor)


def _tun(device: str, address: str, peer: str) -> int:
    """A point-to-point device in the current namespace; its packets come out of the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, flags)
    _ip("addr", "add", address, "peer", peer, "dev", device)
    _ip("link", "set", device, "up")
    return descriptor
