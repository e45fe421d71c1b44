"""All runs of one invocation: connects, warms up, measures in turns, keeps what there is so far."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from chiasm import errors
from chiasm.bench import arrivals, sweep, trace, workload
from chiasm.bench.backend import Backend
from chiasm.bench.curves import Curves, curves
from chiasm.bench.options import BenchOptions, parse_sizes
from chiasm.bench.records import Collector
from chiasm.bench.runner import Plan, Runner
from chiasm.bench.stats import Summary, summarize
from chiasm.bench.sweep import Point, Slot
from chiasm.bench.workload import Conversation, Seed, TraceRow

MAX_WARMUP_CONCURRENCY = 8
_SHAPE, _CONTENT, _ARRIVALS, _WARMUP = range(4)

Connect = Callable[[str], contextlib.AbstractAsyncContextManager[Backend]]
OpenRecords = Callable[[], contextlib.AbstractContextManager[TextIO | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run; `is_whole` unless it was interrupted."""

    slot: Slot
    started_at: float
    is_whole: bool
    summary: Summary
    curves: Curves


@dataclass(slots=True)
class Outcome:
    """What an experiment has found so far."""

    servers: dict[str, Mapping[str, object]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    is_interrupted: bool = False
    error: str = ""
    """What ended it early."""
    records_error: str = ""
    """Why the file of records is not whole."""


class Experiment:
    """The runs that the options ask for.

    open_records: opens the file of records, once there is something to measure.
    """

    def __init__(
        self,
        options: BenchOptions,
        connect: Connect,
        *,
        open_records: OpenRecords = contextlib.nullcontext,
        on_run: Callable[[Slot], None] = lambda slot: None,
    ) -> None:
        self._options, self._connect = options, connect
        self._open_records, self._on_run = open_records, on_run
        self._records: TextIO | None = None
        self._rows = _trace_rows(options)

    async def run(self) -> Outcome:
        """Measures everything. Ctrl-C, a cancellation here, ends it early, with what there is.

        So does an error; where there is nothing yet, it is raised.
        """
        outcome = Outcome()
        try:
            await self._measure_all(outcome)
        except asyncio.CancelledError:
            if not outcome.runs or (task := asyncio.current_task()) is None:
                raise
            task.uncancel()
            outcome.is_interrupted = True
        except Exception as error:
            if not outcome.runs:
                raise
            cause = first_error(error)
            outcome.error = str(cause) or type(cause).__name__
        return outcome

    async def _measure_all(self, outcome: Outcome) -> None:
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            backends: dict[str, Backend] = {}
            for name, endpoint in options.endpoints:
                backends[name] = await stack.enter_async_context(self._connect(endpoint))
                outcome.servers[name] = {
                    "endpoint": endpoint,
                    "model": await backends[name].describe(),
                }
            for name, backend in backends.items():
                await self._warm_up(backend, list(backends).index(name))
            self._records = stack.enter_context(self._open_records())
            for slot in sweep.slots(options.points, list(backends), options.repeat):
                self._on_run(slot)
                await self._measure(slot, backends[slot.endpoint], outcome)

    async def _measure(self, slot: Slot, backend: Backend, outcome: Outcome) -> None:
        labels = {"endpoint": slot.endpoint, "load": str(slot.point), "repeat": slot.repeat}
        collector = Collector(self._records, labels)
        started_at, is_whole = time.time(), False
        try:
            await Runner(backend, self.plan(slot), collector).run()
            is_whole = True
        finally:
            if collector.file_error:
                self._records, outcome.records_error = None, collector.file_error
            if collector.records:
                outcome.runs.append(
                    Run(
                        slot=slot,
                        started_at=started_at,
                        is_whole=is_whole,
                        summary=summarize(collector, self._options.limits),
                        curves=curves(collector.records),
                    )
                )

    async def _warm_up(self, backend: Backend, index: int) -> None:
        """A closed loop with content of its own; nobody looks at its records."""
        options, seed = self._options, self._options.seed
        if not options.warmup:
            return
        conversations = self._conversations(
            (seed, _WARMUP, _SHAPE), (seed, _WARMUP, _CONTENT, index)
        )
        plan = Plan(
            conversations=workload.limited(conversations, options.warmup),
            concurrency=min(options.warmup, MAX_WARMUP_CONCURRENCY),
            timeout_s=options.timeout,
        )
        await Runner(backend, plan, Collector()).run()

    def plan(self, slot: Slot) -> Plan:
        """The plan of a run: shapes and arrivals by repeat, content by run."""
        options = self._options
        conversations = self._conversations(
            (options.seed, _SHAPE, slot.repeat), (options.seed, _CONTENT, slot.ordinal)
        )
        is_closed = slot.point.kind == "concurrency"
        return Plan(
            conversations=workload.limited(conversations, options.most_requests),
            arrivals=None if is_closed else self._arrivals(slot.point, slot.repeat),
            concurrency=int(slot.point.value) if is_closed else None,
            duration_s=options.duration,
            timeout_s=options.timeout,
            think_time_s=options.think_time,
            max_in_flight=options.max_in_flight,
        )

    def _conversations(self, shape: Seed, content: Seed) -> Iterator[Conversation]:
        if self._rows:
            return workload.replay(self._rows, content=content)
        return self._options.random_workload.conversations(shape=shape, content=content)

    def _arrivals(self, point: Point, repeat: int) -> Iterator[float]:
        options = self._options
        if self._rows:
            rate = point.value if point.kind == "rate" else None
            return arrivals.recorded([row.timestamp for row in self._rows], rate)
        if options.arrivals == "constant":
            return arrivals.constant(point.value)
        return arrivals.gamma(point.value, options.burstiness, (options.seed, _ARRIVALS, repeat))


def first_error(error: BaseException) -> BaseException:
    """The first of the errors in the groups in which tasks wrap them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def connector(options: BenchOptions) -> Connect:
    """Connects to an endpoint by its form: a URL speaks OpenAI's API, host:port is a gateway."""
    has_images = options.image_share > 0 or any(row.images for row in _trace_rows(options))

    @contextlib.asynccontextmanager
    async def connect(endpoint: str) -> AsyncIterator[Backend]:
        backend: Backend
        if endpoint.startswith(("http://", "https://")):
            backend = await _connect_http(endpoint, options, has_images)
        else:
            from chiasm.bench.grpc_backend import GrpcBackend

            backend = await GrpcBackend.connect(
                endpoint,
                form=options.prompt,
                has_images=has_images,
                temperature=options.temperature,
                ignore_eos=options.ignore_eos,
                tls=options.gateway_tls,
                api_key=options.gateway_key,
            )
        try:
            yield backend
        finally:
            await backend.close()

    return connect


async def _connect_http(endpoint: str, options: BenchOptions, has_images: bool) -> Backend:
    try:
        from chiasm.bench.openai_backend import OpenAIBackend
    except ModuleNotFoundError as error:
        raise errors.FailedPrecondition(
            f"an http endpoint needs {error.name}: pip install 'chiasm[bench]'"
        ) from None
    return await OpenAIBackend.connect(
        endpoint,
        model=options.model,
        has_images=has_images,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        api_key=options.api_key.get_secret_value(),
    )


def _trace_rows(options: BenchOptions) -> Sequence[TraceRow]:
    if options.trace is None:
        return ()
    try:
        return trace.read(options.trace, parse_sizes(options.image_size)[0])
    except (OSError, ValueError) as error:
        raise errors.InvalidArgument("--trace", str(error)) from None


def to_json(run: Run) -> dict[str, object]:
    """A run as JSON."""
    return {
        "endpoint": run.slot.endpoint,
        "load": {"kind": run.slot.point.kind, "value": run.slot.point.value},
        "repeat": run.slot.repeat,
        "started_at": run.started_at,
        "is_whole": run.is_whole,
        **dataclasses.asdict(run.summary),
    }
