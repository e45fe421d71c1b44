"""Compiles the C++ beside this file with the system's compiler, once for each machine.

The library is kept in the user's cache folder under a name made of the sources, the flags, the
compiler and the processor, so another version or another machine compiles its own. Where there is
no compiler, or it fails, everything still works in plain torch, and slower; the log says so once.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
import torch

SOURCES = (
    "attention.cpp",
    "decode.cpp",
    "dense.cpp",
    "experts.cpp",
    "linear.cpp",
    "pairs.cpp",
    "product.cpp",
    "swiglu.cpp",
    "tiles.cpp",
    "viterbi.cpp",
)
HEADERS = (
    "avx2.h",
    "avx512.h",
    "clock.h",
    "formats.h",
    "generic.h",
    "laid.h",
    "lanes.h",
    "pairs.h",
    "product.h",
    "swiglu.h",
    "wide.h",
)
FLAGS = (
    *("-std=c++17", "-shared", "-fPIC", "-fopenmp", "-O3", "-march=native"),
    # Vectorised rounding; and products and sums that round where the formulas say.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 300.0

_FOLDER = Path(__file__).parent

log = structlog.get_logger()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had. Compiles on the first call."""
    assert torch.get_num_threads()  # torch's own OpenMP is loaded first, and then shared
    try:
        return _loaded()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("native_kernels_unavailable", error=_first_line(error))
        return None


def _loaded() -> ctypes.CDLL:
    path = compiled()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # damaged in the cache
        return ctypes.CDLL(str(compiled()))


def compiled(extra_flags: Sequence[str] = ()) -> Path:
    """The path of the library, compiled if it is not there yet.

    Processes that start together wait for the first to compile. Raises FileNotFoundError without a
    compiler, RuntimeError without a home, and what subprocess raises when it fails.
    """
    compiler = _compiler()
    flags = [*FLAGS, *extra_flags]
    folder = _cache_folder()
    path = folder / f"{_key(compiler, flags)}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # no longer than one compilation, which has its own limit
        if not path.is_file():
            _compile(compiler, flags, path)
    return path


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / path.name
        subprocess.run(
            [compiler, *flags, "-o", str(out), *(str(_FOLDER / name) for name in SOURCES)],
            check=True,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        with out.open("rb") as file:
            os.fsync(file.fileno())
        out.replace(path)  # whole or not at all, whatever loses power


def _compiler() -> str:
    for name in COMPILERS:
        if (found := shutil.which(name)) is not None:
            return found
    raise FileNotFoundError("no C++ compiler")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "chiasm" / "native"


def _key(compiler: str, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60)
    digest = hashlib.sha256()
    parts = [" ".join(flags).encode(), version.stdout, _processor().encode()]
    parts += [(_FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What -march=native goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(key.strip(), value.strip())
    return f"{platform.machine()} {found}"


def _first_line(error: Exception) -> str:
    """What went wrong, in one line: of a compiler its first complaint."""
    if isinstance(error, subprocess.CalledProcessError):
        text = error.stderr.decode(errors="replace").strip()
        return text.splitlines()[0] if text else str(error)
    return str(error)
