"""A control plane for all tests of this folder; it is built once per machine."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from groups import OTHERS_NICENESS, worker
from kube.control_plane import BUILD_SCRIPT, PROGRAMS, ControlPlane, is_built
from kubernetes import client

BUILD_TIMEOUT_S = 1800
BUILD = ["timeout", str(BUILD_TIMEOUT_S), str(BUILD_SCRIPT), str(PROGRAMS)]
HERE = Path(__file__).parent

_build: subprocess.Popen[bytes] | None = None


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """These tests come last, so that the build can go on beside others."""
    items.sort(key=lambda item: HERE in item.path.parents)
    for item in items:
        if HERE in item.path.parents:  # whichever is first waits for the build
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S + 300))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the build, should it be needed, in what the other tests leave of the machine."""
    global _build  # noqa: PLW0603 # pytest keeps no state for a conftest
    wanted = any(HERE in item.path.parents for item in session.items)
    wanted = wanted and worker(session.config) in ("", "gw0")
    if wanted and not session.config.option.collectonly and not is_built():
        _build = subprocess.Popen(
            ["nice", "-n", str(OTHERS_NICENESS), *BUILD],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def pytest_sessionfinish() -> None:
    if _build is not None and _build.poll() is None:
        os.killpg(_build.pid, signal.SIGTERM)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Running; fails, rather than skips, where it cannot be built."""
    if not is_built():  # a build that is under way is waited for
        done = subprocess.run(BUILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if not is_built():
            said = done.stdout.decode(errors="replace").strip().splitlines()
            pytest.fail(f"no control plane: {said[-1] if said else BUILD_SCRIPT}", pytrace=False)
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as running:
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of its own for one test."""
    core = client.CoreV1Api(control_plane.api())
    name = f"test-{uuid.uuid4().hex[:8]}"
    core.create_namespace({"metadata": {"name": name}})
    yield name
    core.delete_namespace(name)
