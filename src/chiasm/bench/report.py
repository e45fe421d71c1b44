"""Tables for the terminal and the JSON document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from chiasm.bench import machine
from chiasm.bench.compare import Spread, ratios, spreads
from chiasm.bench.experiment import Outcome, Run, to_json
from chiasm.bench.options import BenchOptions
from chiasm.bench.stats import LAG_LIMIT_S, PERCENTILES, Distribution, Summary

SCHEMA = 1
WIDTH = 120
"""Columns of the tables where there is no terminal to ask."""

_BOX = box.SIMPLE_HEAD
_PERCENTILES = tuple(f"p{p}" for p in PERCENTILES)


def document(options: BenchOptions, outcome: Outcome) -> dict[str, object]:
    """Everything: what was measured, how, on what. docs/benchmarking.md describes the fields."""
    found = {
        "schema": SCHEMA,
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("chiasm", "numpy")},
        "settings": options.model_dump(mode="json"),
        "seed": options.seed,
        "servers": outcome.servers,
        "is_interrupted": outcome.is_interrupted,
        "error": outcome.error or None,
        "runs": [to_json(run) for run in outcome.runs],
        "spreads": [dataclasses.asdict(s) for s in spreads(outcome.runs)],
        "ratios": [dataclasses.asdict(r) for r in ratios(outcome.runs)],
    }
    return {name: _in_json(value) for name, value in found.items()}


def _in_json(value: object) -> object:
    """Numbers that JSON does not have, the rate `inf` for one, as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _in_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(entry) for entry in value]
    return value


def tables(outcome: Outcome) -> RenderableType:
    """One run in detail, or several as one row each, with spread and ratios."""
    runs = outcome.runs
    parts: list[RenderableType] = []
    if len(runs) == 1:
        parts += [_overview(runs[0]), _details(runs[0].summary)]
    else:
        parts.append(_rows(runs))
    if any(run.slot.repeat for run in runs):
        parts.append(_spreads("over the repeats", spreads(runs)))
    if compared := ratios(runs):
        parts.append(_spreads("ratios", compared))
    parts += [Text(note, style="yellow") for run in runs for note in notes(run)]
    if outcome.records_error:
        note = f"the file of records is not whole: {outcome.records_error}"
        parts.append(Text(note, style="yellow"))
    if outcome.is_interrupted:
        parts.append(Text("interrupted: these are the results so far", style="yellow"))
    if outcome.error:
        note = f"ended by an error, these are the results so far: {outcome.error}"
        parts.append(Text(note, style="yellow"))
    return Group(*parts)


def notes(run: Run) -> Iterator[str]:
    """What a reader must know before believing the numbers of a run."""
    summary = run.summary
    if summary.failed:
        reasons = ", ".join(f"{num} {reason}" for reason, num in summary.failed.items())
        yield f"{_name(run)}: {reasons} of {summary.requests} requests failed"
    if summary.is_generator_late:
        lag, loop_lag = (d.p99 if d else 0 for d in (summary.lag_ms, summary.loop_lag_ms))
        yield (
            f"{_name(run)}: the generator itself was late: p99 of the send lag {lag:.1f} ms, of "
            f"its event loop {loop_lag:.1f} ms (limit {LAG_LIMIT_S * 1e3:g} ms)"
        )
    if summary.num_short:
        yield f"{_name(run)}: {summary.num_short} answers were shorter than asked for"
    if summary.is_cut:
        yield f"{_name(run)}: ended early, at the most samples that the generator keeps"


def _name(run: Run) -> str:
    slot = run.slot
    return " ".join(filter(None, (slot.endpoint, str(slot.point), f"#{slot.repeat + 1}")))


def _overview(run: Run) -> Table:
    s = run.summary
    table = Table("", box=_BOX, show_header=False, title=str(run.slot.point), title_justify="left")
    table.add_column(justify="right")
    table.add_row("requests answered", f"{s.succeeded} of {s.requests}")
    table.add_row("duration, s", _short(s.duration_s))
    table.add_row("requests/s", _short(s.requests_per_s))
    table.add_row("output tokens/s", _short(s.output_tokens_per_s))
    table.add_row("total tokens/s", _short(s.total_tokens_per_s))
    if s.goodput_share is not None and s.goodput_per_s is not None:
        table.add_row("goodput", f"{s.goodput_share:.1%}, {_short(s.goodput_per_s)} requests/s")
    return table


def _details(summary: Summary) -> Table:
    table = Table(*map(_column, ("ms", "n", "mean", *_PERCENTILES, "max")), box=_BOX)
    table.columns[0].justify = "left"
    for name, found in summary.latency_ms.items():
        table.add_row(name, *_numbers(found))
    if summary.lag_ms:
        table.add_row("send lag", *_numbers(summary.lag_ms), end_section=True)
    for name, found in summary.server_ms.items():
        if found.max > 0:
            table.add_row(f"server {name.replace('_', ' ')}", *_numbers(found))
    return table


def _numbers(d: Distribution) -> list[str]:
    return [str(d.count), *map(_short, (d.mean, d.p50, d.p90, d.p95, d.p99, d.max))]


def _rows(runs: Sequence[Run]) -> Table:
    has_goodput = any(run.summary.goodput_share is not None for run in runs)
    table = Table("run", box=_BOX, title="p50/p99 in ms", title_justify="left")
    headers = ["ok/all", "req/s", "out tok/s", "ttft", "itl", "e2e"]
    for header in [*headers, "goodput"] if has_goodput else headers:
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        s = run.summary
        cells = [
            f"{s.succeeded}/{s.requests}",
            *map(_short, (s.requests_per_s, s.output_tokens_per_s)),
        ]
        for metric in ("ttft", "itl", "e2e"):
            d = s.latency_ms.get(metric)
            cells.append(f"{_short(d.p50)}/{_short(d.p99)}" if d else "-")
        if s.goodput_share is not None:
            cells.append(f"{s.goodput_share:.1%}")
        table.add_row(_name(run), *cells)
    return table


def _spreads(title: str, found: Sequence[Spread]) -> Table:
    table = Table("load", "endpoint", "metric", box=_BOX, title=title, title_justify="left")
    for header in ("median", "lowest", "highest"):
        table.add_column(header, justify="right")
    for s in found:
        what = s.endpoint if s.base is None else f"{s.endpoint} / {s.base}"
        table.add_row(s.load, what, s.metric, *map(_short, (s.median, s.low, s.high)))
    return table


def _column(header: str) -> Column:
    return Column(header, justify="right", no_wrap=True)


def _short(value: float) -> str:
    """Three or four digits, whatever the size."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"
