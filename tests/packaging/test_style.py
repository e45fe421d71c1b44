"""Sizes that a reader can take in: no file over 400 lines, no function over 60."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKED = [path.name for path in (ROOT / "src/chiasm").iterdir() if path.is_symlink()]
FOLDERS = ["benchmarks", "src", "tests", *LINKED]
GENERATED = ROOT / "src/chiasm/v1"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
"""Of a triton.jit body, which cannot be cut as freely."""


def sources() -> list[Path]:
    """Every Python file of the repository once: links are not followed, stubs are not ours."""
    found = [ROOT / "setup.py"]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*.py") if not _is_foreign(path))
    return sorted(found)


def _is_foreign(path: Path) -> bool:
    is_linked = any(parent.is_symlink() for parent in path.parents)
    return is_linked or path.is_relative_to(GENERATED)


def long_functions(source: str) -> Iterator[str]:
    """The functions of a file that are too long, signature included, with their lengths."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > (MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES):
                yield f"{node.lineno} {node.name}: {num_lines} lines"


def test_the_whole_repository_is_looked_at_once() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {
        "services/decoder/engine.py",
        "kernels/moe/reference.py",
        "orchestrator/members.py",
        "src/chiasm/errors.py",
        "tests/packaging/test_style.py",
    } <= found
    assert not any(name.startswith("src/chiasm/services/") for name in found)


def test_files_are_short() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    offenders = [
        f"{p.relative_to(ROOT)}: {n} lines" for p, n in sizes.items() if n > MAX_FILE_LINES
    ]
    assert not offenders, "\n".join(offenders)


def test_functions_are_short() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{found}"
        for path in sources()
        for found in long_functions(path.read_text(encoding="utf-8"))
    ]
    assert not offenders, "\n".join(offenders)


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    source = f"def f():\n{body}@triton.jit\ndef g():\n{body}"
    assert list(long_functions(source)) == [f"1 f: {MAX_FUNCTION_LINES + 1} lines"]
