"""What the processes of a stack export, read as Prometheus reads it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Families = dict[str, Metric]


def addresses(orchestrator: str, log_dir: Path) -> dict[str, str]:
    """Where each service of a stack has its /metrics; text-pool and vision-pool are told apart."""
    command = [sys.executable, "-m", "chiasm", "status", "--json", "--endpoint", orchestrator]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = {}
    for member in json.loads(done.stdout)["members"]:
        role = member["role"]
        if role == "expert-pool":
            role = f"{member['shard_sets'][0]['modality']}-pool"
        found[role] = member["metrics_address"]
    # It is no member of its own topology.
    for line in (log_dir / "orchestrator.log").read_text().splitlines():
        if '"listening"' in line:
            found["orchestrator"] = f"127.0.0.1:{json.loads(line)['metrics_port']}"
    return found


def scrape(address: str) -> Families:
    """Metric families by name, a counter's without `_total`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def total(families: Families, sample: str, **labels: str) -> float:
    """The sum over the samples of a name that have these labels."""
    return sum(
        s.value
        for family in families.values()
        for s in family.samples
        if s.name == sample and labels.items() <= s.labels.items()
    )
