"""What a local stack refuses, how it spreads shards, and how it fails. The whole one is in e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from control.processes import is_running
from typer.testing import CliRunner

from chiasm import errors
from chiasm.cli import app, running
from chiasm.local import Interrupted, LocalStack, StackConfig, spread


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """A folder with a configuration that no service can read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("num_shards", "num_servers", "expected"),
    [
        (8, 1, ["0,1,2,3,4,5,6,7/8"]),
        (8, 3, ["0,1/8", "2,3,4/8", "5,6,7/8"]),
        (3, 3, ["0/3", "1/3", "2/3"]),
    ],
)
def test_shards_are_spread_in_runs(num_shards: int, num_servers: int, expected: list[str]) -> None:
    assert [str(spec) for spec in spread(num_shards, num_servers)] == expected


@pytest.mark.parametrize("num_shards", range(1, 10))
def test_every_shard_has_one_server_and_loads_are_even(num_shards: int) -> None:
    for num_servers in range(1, num_shards + 1):
        specs = spread(num_shards, num_servers)
        assert [s for spec in specs for s in spec.shards] == list(range(num_shards))
        sizes = [len(spec.shards) for spec in specs]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text-shards", "2", "--text-servers", "3"], "--text-servers"),
        (["--vision-servers", "0"], "--vision-servers"),
        (["--text-shards", "0"], "--text-shards"),
        (["--port", "70000"], "--port"),
        (["--model", "/nowhere"], "--model"),
    ],
)
def test_up_refuses_what_cannot_be_in_one_line(
    broken_model: Path, flags: list[str], named: str
) -> None:
    result = CliRunner().invoke(app, ["up", "--model", str(broken_model), *flags])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {named}: ")
    assert result.stdout == ""


def test_a_process_that_dies_at_the_start_is_named_and_nothing_stays(
    broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = LocalStack(StackConfig(model=broken_model, log_dir=tmp_path / "logs"))
    pids: list[int] = []
    spawn = stack._spawn

    def recording(name: str, *rest: object) -> None:
        spawn(name, *rest)  # type: ignore[arg-type] # passed through
        pids.append(stack.children[name].pid)

    stack._spawn = recording  # type: ignore[method-assign] # to learn the pids
    with pytest.raises(
        errors.Unavailable, match=r"died during the start with exit code \d"
    ) as died:
        stack.start()
    named = str(died.value).partition(" ")[0]
    assert (tmp_path / "logs" / f"{named}.log").is_file()
    assert str(tmp_path / "logs") in str(died.value)
    assert len(pids) == 6
    assert not any(is_running(pid) for pid in pids)


def test_demo_shows_the_log_of_what_died_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: LocalStack) -> str:
        raise errors.Unavailable("decoder died during the start:\n  line 1\n  line 2")

    monkeypatch.setattr(LocalStack, "start", start)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["  line 1", "  line 2"]


def test_interrupted_start_leaves_nothing(broken_model: Path) -> None:
    stack = LocalStack(StackConfig(model=broken_model))
    stack.interrupt()
    with pytest.raises(Interrupted):
        stack.start()
    assert not stack.children
    assert not stack.log_dir.exists()


def test_status_finds_the_running_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CHIASM_ORCHESTRATOR", raising=False)
    result = CliRunner().invoke(app, ["status"])
    assert (result.exit_code, "--endpoint" in result.stderr) == (1, True)
    with running.published("127.0.0.1:7"):
        assert running.find() == "127.0.0.1:7"
        with running.published("127.0.0.1:8"):
            assert running.find() == "127.0.0.1:8"
        assert running.find() is None
    entry = tmp_path / "chiasm" / "up.json"
    entry.write_text(json.dumps({"pid": 2**22 + 1, "orchestrator": "127.0.0.1:9"}))
    assert running.find() is None
