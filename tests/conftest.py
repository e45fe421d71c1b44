"""What all tests need before they import anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from groups import BY_THE_CLOCK, OTHERS_NICENESS, ByGroup, group, worker
from hypothesis import settings
from processors import be_processor

from chiasm import cores
from chiasm.kernels import native
from chiasm.model.synth import synthesize

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of small models two threads are no faster, and on a busy machine they wait for each other.
torch.set_num_threads(1)
settings.register_profile("chiasm", deadline=None)  # no test asserts how long something takes
settings.load_profile("chiasm")
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; triton must find this when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torchvision's wheel expects the CUDA build of torch; beside a CPU torch its import fails for want
# of these two operators' schemas. The transforms that transformers' processors use call neither.
_TORCHVISION: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # no annotations in torch
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        _TORCHVISION.define(_schema)
    except RuntimeError:  # a matching torchvision has defined it
        continue


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as one of them mostly waits; of many cores four will do."""
    return min(cores.usable(), 4) + 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compiles the kernels before workers need them all at once."""
    if session.config.getoption("numprocesses", None):
        native.library()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if worker(config):  # the longest group first
        items.sort(key=lambda item: group(item.path) != BY_THE_CLOCK)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if worker(item.config) and group(item.path) != BY_THE_CLOCK:
        os.nice(max(0, OTHERS_NICENESS - os.nice(0)))
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _logs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that ran in this process leaves no logger behind that writes to its streams.

    Tracebacks are plain: to draw one with its tensors takes seconds, and a server that does it is
    silent for so long.
    """
    configure = structlog.configure
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    configure(processors=[*structlog.get_config()["processors"][:-1], plain])

    def uncached(**settings: Any) -> None:
        configure(**{**settings, "cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", uncached)
    yield
    structlog.reset_defaults()


@pytest.fixture(params=["this processor", "AVX2", "any processor"])
def any_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels as this processor has them, and as others have."""
    be_processor(request.param, monkeypatch)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tiny` synthetic checkpoint, seed 0. Read it; copy it before changing it."""
    directory = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthesize(directory)
    return directory
