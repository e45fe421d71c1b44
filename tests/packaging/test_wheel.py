"""The wheel holds what the tree holds, and works without the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPP = (".cpp", ".h")
LINKED = sorted(path.name for path in (ROOT / "src/chiasm").iterdir() if path.is_symlink())
"""Folders of the repository that are packages below chiasm."""

BUILD_INPUTS = [
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "protos", "src"),
    *LINKED,
]
"""All that a build may need."""

BUILD_TIMEOUT_S, RUN_TIMEOUT_S = 240, 60

NO_TORCH = [
    "chiasm.client",
    "chiasm.cli",
    "chiasm.orchestrator.__main__",
    "chiasm.services.gateway.__main__",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: no stub and no leftover of an earlier build can slip in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*_pb2*", "build")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out)]
    built = subprocess.run(
        [*command, str(tree)],
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds `chiasm` in the unpacked wheel alone."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
    )


def tree_modules() -> set[str]:
    """Files of Python code as they should lie in a wheel, generated ones left out."""
    package = ROOT / "src/chiasm"
    found = {
        f"chiasm/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents) and "_pb2" not in path.name
    }
    for folder in LINKED:
        found |= {
            f"chiasm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")
        }
    return found


def stubs() -> set[str]:
    """What the build makes of protos/."""
    return {
        f"chiasm/v1/{proto.stem}_pb2{suffix}"
        for proto in (ROOT / "protos").rglob("*.proto")
        for suffix in (".py", ".pyi", "_grpc.py")
    }


def test_modules_are_those_of_the_tree_and_the_stubs(names: set[str]) -> None:
    assert {"services", "kernels", "orchestrator"} <= set(LINKED)
    assert {name for name in names if name.endswith(".py")} == tree_modules() | {
        name for name in stubs() if name.endswith(".py")
    }


def test_data_files_are_there(names: set[str]) -> None:
    folder = ROOT / "src/chiasm"
    found = (folder / "assets").rglob("*")
    assets = {f"chiasm/{path.relative_to(folder)}" for path in found if path.is_file()}
    assert assets
    native = ROOT / "kernels/native"
    sources = {f"chiasm/kernels/native/{p.name}" for p in native.iterdir() if p.suffix in CPP}
    assert sources
    table = "chiasm/kernels/quant/tcq2_table.json"
    assert {"chiasm/py.typed", table, *assets, *sources, *stubs()} <= names


def test_nothing_else_is_there(names: set[str]) -> None:
    foreign = {n for n in names if n.partition("/")[0].partition("-")[0] != "chiasm"}
    assert not foreign
    assert not {n for n in names if "/tests/" in n or "/test_" in n or n.endswith(".proto")}


def test_the_licence_is_there(names: set[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_works(site: Path) -> None:
    entry = (next(site.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "chiasm = chiasm.cli:main" in entry
    program = "import sys; from chiasm.cli import main; sys.argv[:] = ['chiasm', '--help']; main()"
    done = run(site, "-c", program)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("up", "generate", "gateway", "expert-pool"))


def test_the_client_is_the_wheels_own(site: Path) -> None:
    done = run(site, "-c", "import chiasm.client; print(chiasm.client.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch(site: Path, module: str) -> None:
    done = run(site, "-c", f"import sys, {module}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr or f"{module} imports torch"
