"""Documents that say what the code says: settings, error reasons, links, the worked example."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from settings_tables import CLASSES, DOCUMENT, table, with_tables

from chiasm.config import ProcessSettings
from chiasm.kernels.moe import ShardWeights, shard_partial
from chiasm.kernels.quant.formats import DenseMatrices
from chiasm.model.moe import Partial, combine
from chiasm.transport import tensors
from chiasm.types import shard_experts

ROOT = Path(__file__).parents[2]
LINKED = [path.name for path in (ROOT / "src/chiasm").iterdir() if path.is_symlink()]
SOURCES = ["src/chiasm", *LINKED]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

EVENT = re.compile(r"[a-z_]{3,}")
LOGS = re.compile(r"log\.\w+|self\._log|_log_failure")
REASON = re.compile(r"[A-Z][A-Z0-9_]{2,}")
EXAMPLE_TOLERANCE = 1e-6
"""The numbers of the worked example are printed with seven digits."""


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def trees() -> dict[str, ast.Module]:
    """Every source file, parsed; links are not followed."""
    found = {}
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                name = path.relative_to(ROOT).as_posix()
                found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def constants(tree: ast.Module) -> dict[str, str]:
    """Names that a file assigns a string to, at its top."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def reasons_of(tree: ast.Module, known: dict[str, str]) -> Iterator[str]:
    """Words a file gives as `reason=` or as `default_reason`."""
    for node in ast.walk(tree):
        value: ast.expr | None = None
        if isinstance(node, ast.keyword) and node.arg == "reason":
            value = node.value
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "default_reason" for t in targets):
                value = node.value
        if isinstance(value, ast.Name | ast.Attribute):
            name = value.id if isinstance(value, ast.Name) else value.attr
            value = ast.Constant(known.get(name))
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def raised_reasons() -> dict[str, set[str]]:
    """Every ErrorInfo.reason in the source, with the files that give it."""
    known: dict[str, str] = {}
    for tree in trees().values():
        known |= constants(tree)
    found: dict[str, set[str]] = {}
    for name, tree in trees().items():
        for reason in reasons_of(tree, known):
            if REASON.fullmatch(reason):
                found.setdefault(reason, set()).add(name)
    return found


def documented_reasons() -> list[str]:
    """The first column of the tables of docs/errors.md."""
    return re.findall(r"^\| `([A-Z0-9_]+)` \|", read("docs/errors.md"), re.MULTILINE)


def test_every_reason_is_documented_once() -> None:
    documented, raised = documented_reasons(), raised_reasons()
    assert {"EMBEDDING_EVICTED", "EXPERT_POOL_UNAVAILABLE", "DRAINING"} <= set(raised)
    assert len(documented) == len(set(documented))
    assert set(documented) - set(raised) == set(), "in docs/errors.md, but nobody gives them"
    missing = {reason: files for reason, files in raised.items() if reason not in documented}
    assert not missing, "not in docs/errors.md"


def events_of(tree: ast.Module) -> Iterator[str]:
    """What a file logs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and LOGS.fullmatch(ast.unparse(node.func)):
            for part in (part for value in node.args for part in ast.walk(value)):
                if isinstance(part, ast.Constant) and EVENT.fullmatch(str(part.value)):
                    yield str(part.value)


def test_every_event_is_documented() -> None:
    services = [tree for name, tree in trees().items() if not name.startswith("training/")]
    logged = {event for tree in services for event in events_of(tree)}
    assert {"listening", "stalled", "request_finished", "load_failed"} <= logged
    section = read("docs/operations.md").partition("## Logs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = {event for row in rows for event in re.findall(r"`(\w+)`", row)}
    assert documented - logged == set(), "in docs/operations.md, but nobody says it"
    assert logged - documented == set(), "not in docs/operations.md"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_settings_are_documented(cls: type[ProcessSettings]) -> None:
    assert table(cls) in DOCUMENT.read_text(encoding="utf-8"), (
        "run: python tests/settings_tables.py"
    )


def test_the_tables_of_settings_have_their_places() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", text)
    for target in filter(None, (a or b for a, b in targets)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_tests_that_are_named_exist() -> None:
    """Paths in backticks, alone or as `path::test`."""
    pattern = re.compile(
        r"`((?:src|services|kernels|orchestrator|training|protos|tests|docs|benchmarks)/[\w./-]+)"
        r"(?:::(\w+))?`"
    )
    for page in PAGES:
        for path, test in pattern.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            assert not test or f"def {test}(" in read(path), f"{page.name}: {path}::{test}"


def example() -> dict[str, Any]:
    text = read("docs/expert-protocol.md")
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    merged: dict[str, Any] = {}
    for block in blocks:
        merged |= json.loads(block)
    return merged


def shard_weights(experts: list[dict[str, Any]], held: range) -> ShardWeights:
    return ShardWeights(
        first=held.start,
        gate_up=DenseMatrices(torch.tensor([experts[e]["gate"] + experts[e]["up"] for e in held])),
        down=DenseMatrices(torch.tensor([experts[e]["down"] for e in held])),
    )


def test_the_worked_example_of_the_expert_protocol() -> None:
    given = example()
    hidden = torch.tensor(given["hidden"])
    expert_ids = torch.tensor(given["expert_ids"], dtype=torch.int32)
    weights = torch.tensor(given["expert_weights"])
    partials = []
    for shard, expected in enumerate(given["partials"]):
        held = shard_experts(shard, len(given["partials"]), len(given["experts"]))
        rows, values = shard_partial(
            hidden, expert_ids, weights, shard_weights(given["experts"], held)
        )
        assert rows.tolist() == expected["rows"]
        torch.testing.assert_close(
            values, torch.tensor(expected["values"]), rtol=0, atol=EXAMPLE_TOLERANCE
        )
        partials.append(Partial(shard=shard, rows=rows, values=values))
    combined = combine(partials, hidden)
    torch.testing.assert_close(
        combined, torch.tensor(given["combined"]), rtol=0, atol=EXAMPLE_TOLERANCE
    )


def test_the_bytes_of_the_worked_example() -> None:
    given = example()
    wire = tensors.to_wire(torch.tensor(given["hidden"]))
    assert wire.data == bytes.fromhex(given["hidden_bytes"])
    assert wire.crc32c == int(given["hidden_crc32c"], 16)
    assert google_crc32c.value(b"123456789") == int(given["check_crc32c"], 16)
