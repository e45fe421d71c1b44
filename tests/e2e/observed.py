"""A running `chiasm up`, and everything that it tells about itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from e2e.cases import picture, png
from e2e.collector import Collector, collecting
from e2e.metrics_scrape import Families, addresses, scrape, total
from e2e.stack import up

from chiasm.client import Client
from chiasm.model.config import ModelConfig
from chiasm.v1 import inference_pb2, inference_pb2_grpc

WAIT_S = 20.0
ANNOUNCEMENT = "listening "


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A running stack, and everything it tells."""

    client: Client
    endpoint: str
    collector: Collector
    environment: dict[str, str]
    metrics: dict[str, str]
    log_dir: Path
    model: ModelConfig
    folder: Path

    def generate(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """The client as a process of its own."""
        command = [sys.executable, "-m", "chiasm", "generate", "--endpoint", self.endpoint]
        return subprocess.run(
            [*command, "--json", "--temperature", "0", "--ignore-eos", *flags],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment},
            timeout=60,
        )

    def send(self, *, metadata: tuple[tuple[str, str], ...], request_id: str = "") -> str:
        """A request as another client would send it; the id that the gateway gives it."""
        part = inference_pb2.Part(text="Hello")
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            chat=inference_pb2.Chat(messages=[inference_pb2.Message(role="user", parts=[part])]),
            sampling=inference_pb2.SamplingParams(max_tokens=3, ignore_eos=True),
        )
        with grpc.insecure_channel(self.endpoint) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            answers = list(stub.Generate(request, metadata=metadata, timeout=WAIT_S))
        return str(answers[0].started.request_id)

    def picture(self, seed: int) -> Path:
        path = self.folder / f"{seed}.png"
        path.write_bytes(png(picture(84, 112, seed)))
        return path

    def scrape(self) -> dict[str, Families]:
        """All services, once nothing is in flight: the ledger closes after the last message."""

        def is_idle() -> bool:
            return total(scrape(self.metrics["gateway"]), "chiasm_requests_in_flight") == 0

        wait_until(is_idle)
        return {service: scrape(address) for service, address in self.metrics.items()}

    def lines(self, service: str) -> list[dict[str, Any]]:
        """A log, but for the line that tells the launcher the address."""
        text = (self.log_dir / f"{service}.log").read_text()
        return [json.loads(ln) for ln in text.splitlines() if not ln.startswith(ANNOUNCEMENT)]


@contextmanager
def observing(checkpoint: Path, folder: Path) -> Iterator[Observed]:
    """Starts a stack that exports its spans to this process."""
    log_dir = folder / "logs"
    with (
        collecting() as (collector, environment),
        up(checkpoint, "--log-dir", str(log_dir), env=environment) as client,
    ):
        yield Observed(
            client=client,
            endpoint=listening(log_dir, "gateway"),
            collector=collector,
            environment=environment,
            metrics=addresses(listening(log_dir, "orchestrator"), log_dir),
            log_dir=log_dir,
            model=ModelConfig.load(checkpoint),
            folder=folder,
        )


def listening(log_dir: Path, service: str) -> str:
    """Where a service listens, as it has told the launcher."""
    lines = (log_dir / f"{service}.log").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(ANNOUNCEMENT)]
    return line.removeprefix(ANNOUNCEMENT)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
