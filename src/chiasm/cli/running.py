"""How `chiasm status` finds what `chiasm up` started: a small file in the user's runtime folder."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _path() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir()) / f"user-{os.getuid()}"
    return folder / "chiasm" / "up.json"


def _write(path: Path, entry: str) -> None:
    """Raises OSError where a folder on the way is a link or another user's: in a shared temporary
    folder anybody may have made it first."""
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(exist_ok=True, mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{folder} is not ours")
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(entry)
    partial.replace(path)


@contextlib.contextmanager
def published(orchestrator: str) -> Iterator[None]:
    """Names this process's orchestrator to `status` for the time of the block.

    Of several systems of one user the last one started is found. Without a runtime folder nothing
    is published: `status --endpoint` still works.
    """
    path, entry = _path(), json.dumps({"pid": os.getpid(), "orchestrator": orchestrator})
    with contextlib.suppress(OSError):
        _write(path, entry)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text() == entry:
                path.unlink()


def find() -> str | None:
    """The orchestrator of the running system, if there is one."""
    path = _path()
    try:
        if path.lstat().st_uid != os.getuid():
            return None  # planted by someone else in a shared temporary folder
        entry = json.loads(path.read_text())
        os.kill(entry["pid"], 0)
        return str(entry["orchestrator"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
