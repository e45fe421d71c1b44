"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from chiasm.errors import FailedPrecondition

LOCK = "chiasm.lock"


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Locks the folder for the time of the block, or the life of the process, however it ends.

    doing: what the message says of the other, "converting to". Raises FailedPrecondition while
    another process has the folder.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever has just ended has removed what was opened here, and another may lock anew.
            is_alone = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
        except OSError:
            is_alone = False
        if not is_alone:
            raise FailedPrecondition(f"another process is {doing} {folder}")
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
