"""Whether files have changed, by what the file system says of them."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[tuple[int, int], ...]


def stamp(*paths: Path) -> Stamp:
    """Another value once a file is written again or replaced. Raises OSError for a missing one."""
    states = [path.stat() for path in paths]
    return tuple((state.st_mtime_ns, state.st_ino) for state in states)
