"""A server of one shard keeps that shard in memory, and touches no more of the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.banks import LARGE

from chiasm.model.synth import synthesize

SLACK_BYTES = 16 << 20
"""For the interpreter, the allocator and pages that the kernel maps around a touched one."""

LOAD_ONE_SHARD = """
import json, sys
from pathlib import Path
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.types import Modality, shard_experts

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")]

config = ModelConfig.load(Path(sys.argv[1]))
checkpoint = Checkpoint(Path(sys.argv[1]), config)
checkpoint.get("model.norm.weight")
base, bytes_before = resident(), checkpoint.bytes_read
held = [
    checkpoint.expert(layer, Modality.TEXT, expert)
    for layer in config.text.moe_layers
    for expert in shard_experts(2, 8, config.text.num_experts)
]
loaded = resident()
bytes_read = checkpoint.bytes_read - bytes_before
checkpoint.close()
closed = resident()
print(json.dumps({
    "owned": sum(t.nbytes for pair in held for t in pair),
    "bytes_read": bytes_read,
    "anon": loaded[0] - base[0],
    "file": loaded[1] - base[1],
    "anon_closed": closed[0] - base[0],
    "file_closed": closed[1] - base[1],
}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_one_shard_of_a_large_checkpoint(tmp_path: Path) -> None:
    synthesize(tmp_path / "wide", preset=LARGE)
    experts_on_disk = 3 * 16 * 3 * 512 * (1024 + 512) * 2
    shard = 3 * 2 * 3 * 512 * 1024 * 2
    assert sum(f.stat().st_size for f in (tmp_path / "wide").iterdir()) > experts_on_disk

    out = subprocess.run(
        [sys.executable, "-c", LOAD_ONE_SHARD, str(tmp_path / "wide")],
        timeout=120,
        check=True,
        capture_output=True,
    ).stdout
    found = json.loads(out)
    assert found["owned"] == found["bytes_read"] == shard
    assert abs(found["anon"] - shard) < SLACK_BYTES
    assert abs(found["anon_closed"] - shard) < SLACK_BYTES
    assert found["file"] < shard + SLACK_BYTES
    assert found["file_closed"] < SLACK_BYTES
