"""An expert server as a process, and a way to talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from expert_pool.test_service import MODULE, Stub, await_serving
from processes import ServiceProcess, running

from chiasm.model.config import ModelConfig


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(tiny_checkpoint)


@pytest.fixture(scope="package")
def server(tiny_checkpoint: Path) -> Iterator[ServiceProcess]:
    """Text shards 1 and 3 of 4, float32."""
    flags = ("--model", str(tiny_checkpoint), "--modality", "text", "--dtype", "float32")
    with running(MODULE, *flags, "--shards", "1,3/4") as process:
        yield process


@pytest.fixture
def stub(server: ServiceProcess) -> Iterator[Stub]:
    with grpc.insecure_channel(server.address) as channel:
        await_serving(channel)
        yield Stub(channel)
