"""Prometheus and promtool, from the system or out of Debian's package."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chiasm-tools"
TIMEOUT_S = 240


def promtool() -> str:
    """Where it is; without it, and without a way to get it, the test fails."""
    return _program("promtool")


def prometheus() -> str:
    """The same of the server."""
    return _program("prometheus")


@cache
def _program(name: str) -> str:
    found = shutil.which(name)
    if found is not None:
        return found
    unpacked = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not unpacked.exists():
            try:
                _unpack(unpacked)
            except (OSError, subprocess.SubprocessError):
                pytest.fail(f"{name} is missing: apt-get install prometheus", pytrace=False)
    return str(unpacked)


def _unpack(to: Path) -> None:
    """Takes a program out of the package, without installing it."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        try:
            _run("apt-get", "download", "prometheus", cwd=folder)
        except subprocess.CalledProcessError:
            _run("apt-get", "update", cwd=folder)  # a fresh machine has no lists yet
            _run("apt-get", "download", "prometheus", cwd=folder)
        (package,) = Path(folder).glob("prometheus_*.deb")
        _run("dpkg-deb", "--extract", str(package), "root", cwd=folder)
        (Path(folder) / "root/usr/bin" / to.name).replace(to)


def _run(*command: str, cwd: str) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=TIMEOUT_S)
