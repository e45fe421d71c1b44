"""Where measurements are kept: results/NAME.json, with the machine and how busy it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chiasm.bench import machine

FOLDER = Path(__file__).parent / "results"


@contextlib.contextmanager
def measuring(name: str) -> Iterator[dict[str, Any]]:
    """What is put into the dictionary becomes the file, unless the measurement fails."""
    load = os.getloadavg()  # before: whether the machine was quiet
    found: dict[str, Any] = {"machine": machine.describe(), "load_average": load}
    yield found
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
