"""`chiasm convert` holds a matrix at a time, however large the model is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint.banks import LARGE

from chiasm.model.synth import synthesize

MAX_GROWTH_BYTES = 40 << 20
"""A few matrices in float32, and what encoding them takes."""

NARROW = replace(LARGE, text_intermediate=512, vision_intermediate=256)

CONVERT = """
import os, sys, threading
from pathlib import Path
sys.path.append({tests!r})
from processes import memory_bytes
from chiasm.convert import plan, stream
from chiasm.convert.plan import Options

def convert(model):
    options = Options(text_experts="int8", vision_experts="int4")
    stream.run(plan.make(model, options), model.with_name(model.name + "-converted"))

def watch():
    while not over.wait(0.002):
        held.append(memory_bytes(os.getpid(), "RssAnon"))

small, large = map(Path, sys.argv[1:])
convert(small)  # what is needed once, whatever the size
over, held = threading.Event(), [memory_bytes(os.getpid(), "RssAnon")]
watcher = threading.Thread(target=watch)
watcher.start()
convert(large)
over.set()
watcher.join()
print(max(held) - held[0], len(held))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.symlink_to(tiny_checkpoint)
    synthesize(large, preset=NARROW)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 3 * MAX_GROWTH_BYTES
    program = CONVERT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", program, str(small), str(large)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # others' threads would be waited for
    )
    growth, num_looks = map(int, done.stdout.split())
    assert num_looks > 20
    assert growth < MAX_GROWTH_BYTES
