"""`chiasm convert` holds a matrix at a time, however large the model is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.banks import LARGE

from chiasm.model.synth import synthesize

MAX_GROWTH_BYTES = 80 << 20
"""A few matrices in float32, what encoding them takes, and torch's first use of its threads."""

CONVERT = """
import os, sys, threading
from pathlib import Path
sys.path.append({tests!r})
from processes import memory_bytes
from chiasm.convert import plan, stream
from chiasm.convert.plan import Options

def watch():
    while not over.wait(0.002):
        held.append(memory_bytes(os.getpid(), "RssAnon"))

whole = plan.make(Path(sys.argv[1]), Options(text_experts="int8", vision_experts="int4"))
over, held = threading.Event(), [memory_bytes(os.getpid(), "RssAnon")]
watcher = threading.Thread(target=watch)
watcher.start()
stream.run(whole, Path(sys.argv[2]))
over.set()
watcher.join()
print(max(held) - held[0], len(held))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    synthesize(tmp_path / "model", preset=LARGE)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert size > 3 * MAX_GROWTH_BYTES
    program = CONVERT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model"), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        text=True,
    )
    growth, num_looks = map(int, done.stdout.split())
    assert num_looks > 20
    assert growth < MAX_GROWTH_BYTES
