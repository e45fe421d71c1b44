"""A real Prometheus scrapes real services, and every panel of the dashboards shows something."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.observed import Observed

from helm import tools

DASHBOARDS = Path(__file__).parents[2] / "helm/chiasm/files/dashboards"
LABELS = {"namespace": "shop", "app_kubernetes_io_instance": "chiasm", "pod": "pod-0"}
SCALING_ONLY = {"Replicas wanted", "Replicas that the demand would take"}
"""Panels of what is not there without scaling."""
WAIT_S = 60.0


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression, as Grafana sends it."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "1m")
                yield (
                    panel["title"],
                    expression.replace("$namespace", LABELS["namespace"]).replace(
                        "$release", LABELS["app_kubernetes_io_instance"]
                    ),
                )


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, observed: Observed) -> Iterator[str]:
    """Address of a server that scrapes every service of the stack each second."""
    folder = tmp_path_factory.mktemp("prometheus")
    targets = [{"targets": [*observed.metrics.values()], "labels": LABELS}]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "chiasm", "static_configs": targets}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [tools.prometheus(), f"--config.file={folder / 'config.yaml'}"]
    path = folder / "prometheus.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder}", "--web.listen-address=127.0.0.1:0"],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield f"http://{listening(path)}"
    finally:
        process.terminate()
        process.wait(20)


def listening(log: Path) -> str:
    """The address that Prometheus says it has bound."""
    end = time.monotonic() + WAIT_S
    while not (found := re.search(r'"Listening on" address=(\S+)', log.read_text())):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found[1]


def ask(prometheus: str, expression: str) -> list[Any]:
    """The result's series. Raises urllib's errors for what Prometheus refuses."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    result: list[Any] = found["data"]["result"]
    return result


def has_scraped(prometheus: str, observed: Observed) -> bool:
    try:
        up = ask(prometheus, "up == 1")
    except OSError:
        return False
    return len(up) == len(observed.metrics)


def test_every_panel_shows_something(prometheus: str, observed: Observed) -> None:
    end = time.monotonic() + WAIT_S
    while not has_scraped(prometheus, observed):
        assert time.monotonic() < end
        time.sleep(0.2)
    missing = {title for title, _ in panels()}
    end = time.monotonic() + 3 * WAIT_S
    seed = 0
    while missing - SCALING_ONLY and time.monotonic() < end:
        seed += 1
        image = str(observed.picture(100 + seed % 3))
        done = observed.generate("--prompt", "What?", "--image", image, "--max-tokens", "4")
        assert done.returncode == 0, done.stderr
        assert observed.generate("--prompt", "what " * 20_000).returncode
        missing = {title for title, expression in panels() if not ask(prometheus, expression)}
    assert missing == SCALING_ONLY
