"""Whole experiments with fake backends: order, seeds, what remains after Ctrl-C, the report."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bench.fakes import FakeBackend
from bench.virtual import run
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from chiasm import errors
from chiasm.bench import plots, report
from chiasm.bench.backend import Backend
from chiasm.bench.experiment import Experiment, Outcome
from chiasm.bench.options import BenchOptions
from chiasm.cli import app

SMALL = {"input_len": "uniform:4,30", "output_len": "5", "warmup": 2, "num_requests": 6}
COMPARED = {"compare": ["old=a:1", "new=b:2"], "sweep": "concurrency=1,2", "repeat": 2}


def _options(**changes: object) -> BenchOptions:
    return BenchOptions.model_validate(SMALL | changes)


def _experiment(
    options: BenchOptions, records: io.StringIO | None = None, **backend: Any
) -> tuple[Experiment, dict[str, FakeBackend], list[str]]:
    backends: dict[str, FakeBackend] = {}
    order: list[str] = []

    @contextlib.asynccontextmanager
    async def connect(endpoint: str) -> AsyncIterator[Backend]:
        backends[endpoint] = FakeBackend(**backend)
        yield backends[endpoint]

    experiment = Experiment(
        options,
        connect,
        open_records=lambda: contextlib.nullcontext(records),
        on_run=lambda s: order.append(f"{s.endpoint} {s.point}"),
    )
    return experiment, backends, order


def _measured(options: BenchOptions) -> Outcome:
    return run(_experiment(options)[0].run())


def test_compared_endpoints_get_the_same_shapes_and_other_content() -> None:
    experiment, backends, order = _experiment(_options(**COMPARED))
    outcome = run(experiment.run())
    assert order[:4] == [
        "old concurrency 1", "new concurrency 1", "old concurrency 2", "new concurrency 2",
    ]  # fmt: skip
    assert len(outcome.runs) == 8
    assert all(r.summary.requests == 6 for r in outcome.runs)
    old, new = backends["a:1"].prepared, backends["b:2"].prepared
    assert len(old) == 2 + 4 * 6
    assert [t.passage.num_tokens for t in old] == [t.passage.num_tokens for t in new]
    seeds = [t.passage.seed for t in old + new]
    assert len(set(seeds)) == len(seeds)


def test_document_and_tables() -> None:
    records = io.StringIO()
    options = _options(**COMPARED, slo="ttft=500", seed=5)
    experiment, _, _ = _experiment(options, records)
    outcome = run(experiment.run())
    document = json.loads(json.dumps(report.document(options, outcome)))
    assert document["seed"] == document["settings"]["seed"] == 5
    assert document["servers"]["new"] == {"endpoint": "b:2", "model": {"name": "fake"}}
    assert {r["metric"] for r in document["ratios"]} >= {"requests/s", "ttft p99 ms", "goodput"}
    assert all(r["median"] == pytest.approx(1.0) for r in document["ratios"])
    assert document["runs"][0]["latency_ms"]["itl"]["count"] == 6 * 4
    assert document["runs"][0]["server_ms"]["queue"]["p99"] == pytest.approx(1.0)
    lines = [json.loads(line) for line in records.getvalue().splitlines()]
    assert len(lines) == 8 * 6  # the warm-up is not among them
    assert {line["load"] for line in lines} == {"concurrency 1", "concurrency 2"}
    console = Console(file=io.StringIO(), width=report.WIDTH)
    console.print(report.tables(outcome))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "new / old" in text
    assert "100.0%" in text


def test_same_seed_same_document() -> None:
    def runs(seed: int) -> list[object]:
        options = _options(rate=5.0, seed=seed)
        return [r.summary for r in _measured(options).runs]

    assert runs(1) == runs(1) != runs(2)


@pytest.mark.parametrize(("until", "num_runs"), [(0.9, 1), (2.5, 2)])
def test_interrupt_leaves_what_there_is(until: float, num_runs: int) -> None:
    experiment, backends, _ = _experiment(_options(sweep="concurrency=1,1,1", num_requests=8))

    async def main() -> Outcome:
        task = asyncio.create_task(experiment.run())
        await asyncio.sleep(until)
        task.cancel()
        return await task

    outcome = run(main())
    assert outcome.is_interrupted
    assert len(outcome.runs) == num_runs
    assert [r.is_whole for r in outcome.runs] == [True] * (num_runs - 1) + [False]
    assert outcome.runs[-1].summary.failed == {"INTERRUPTED": 1}
    assert backends["127.0.0.1:8000"].in_flight == 0


def test_an_error_leaves_what_there_is() -> None:
    options = _options(sweep="concurrency=1,1", num_requests=8)
    broken = {"fails": lambda i: "" if i < 2 + 8 + 3 else str(1 // 0)}
    outcome = run(_experiment(options, **broken)[0].run())
    assert outcome.error == "integer division or modulo by zero"
    assert [r.is_whole for r in outcome.runs] == [True, False]
    assert outcome.runs[1].summary.succeeded == 3
    assert report.document(options, outcome)["error"] == outcome.error
    with pytest.raises(ExceptionGroup):
        run(_experiment(options, fails=lambda i: str(1 // 0))[0].run())


class _FullDisk(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_fails_no_request() -> None:
    outcome = run(_experiment(_options(sweep="concurrency=1,2"), _FullDisk())[0].run())
    assert [r.summary.succeeded for r in outcome.runs] == [6, 6]
    assert "No space left" in outcome.records_error
    console = Console(width=report.WIDTH)
    with console.capture() as captured:
        console.print(report.tables(outcome))
    assert "the file of records is not whole" in captured.get()


def test_nothing_is_opened_for_a_system_that_is_away(tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    records.write_text("old")
    flags = ["--endpoint", "http://127.0.0.1:9/v1/completions", "--records", str(records)]
    done = CliRunner().invoke(app, ["bench", "serve", *flags])
    assert done.exit_code == 1, done.output
    assert records.read_text() == "old"


@pytest.mark.parametrize(("error", "status"), [("", 0), ("a defect", 1)])
def test_files_are_written_before_anything_is_printed(
    error: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, file, seen = _measured(_options()), tmp_path / "r.json", list[Any]()
    outcome.error = error
    monkeypatch.setattr(import_module("chiasm.cli.bench"), "_measure", lambda options: outcome)
    monkeypatch.setattr(report, "tables", lambda _: seen.append(json.loads(file.read_text())) or "")
    done = CliRunner().invoke(app, ["bench", "serve", "--json", str(file)])
    assert done.exit_code == status
    assert error in done.output
    (document,) = seen
    assert len(document["runs"]) == 1
    assert document["error"] == (error or None)


def test_trace_at_its_own_times_and_stretched(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"timestamp": t, "prompt_tokens": 5, "output_tokens": 2})
            for t in (100.0, 101.0, 104.0)
        )
    )
    options = _options(trace=file, num_requests=None)
    (recorded,) = _measured(options).runs
    assert recorded.summary.requests == 3
    assert recorded.summary.duration_s == pytest.approx(4.0 + 0.12)
    (stretched,) = _measured(_options(trace=file, rate=1.0)).runs
    assert stretched.summary.duration_s == pytest.approx(2.0 + 0.12)
    with pytest.raises(errors.InvalidArgument, match="--trace"):
        _measured(_options(trace=tmp_path / "none"))


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 1, "concurrency": 1},
        {"dataset": "trace"},
        {"dataset": "random", "trace": "t.jsonl"},
        {"prefix_groups": 2},
        {"compare": ["a=x"]},
        {"compare": ["a=x", "a=y"]},
        {"compare": ["x", "y"]},
        {"arrivals": "constant", "burstiness": 2, "rate": 1},
        {"plot": "x.pdf"},
        {"image_size": "9999999x1"},
        {"image_size": "12"},
        {"rate": float("nan")},
        {"num_requests": 10**9},
        {"sweep": "rate=-1"},
    ],
)
def test_refused_options(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _options(**changes)


@pytest.mark.parametrize("name", ["figure.svg", "figure.png"])
def test_plot(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = _measured(_options(sweep="rate=5,20"))
    plots.draw(outcome.runs, tmp_path / name)
    start = (tmp_path / name).read_bytes()[:200]
    assert b"<?xml" in start if name.endswith("svg") else start.startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(errors.FailedPrecondition, match=r"pip install 'chiasm\[bench\]'"):
        plots.require()
