"""The gateway as a process: what it imports, when it is ready; and the spans of a request."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import processes
import pytest
from gateway.harness import FakeDecoder, FakeEncoder, Stack, png, running
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chiasm import errors
from chiasm.client import AsyncClient, Sampling, image, user
from chiasm.membership import MemberInfo, MemberState, Role, Topology
from chiasm.telemetry import traces
from chiasm.transport.interceptors import CallInterceptor
from chiasm.transport.topology import topology_to_proto
from chiasm.v1 import control_pb2, control_pb2_grpc

MODULES = ["chiasm.services.gateway.__main__", "chiasm.client", "chiasm.cli"]


@pytest.mark.parametrize("module", MODULES)
def test_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class Orchestrator(control_pb2_grpc.OrchestratorServicer):
    """Names the members it was given, and takes reports."""

    def __init__(self, *members: MemberInfo) -> None:
        self._members = members
        self.reports: list[control_pb2.MemberReport] = []

    async def WatchTopology(
        self, request: control_pb2.WatchTopologyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.Topology]:
        topology = Topology(instance_id="i", version=1, settling=False, members=self._members)
        yield topology_to_proto(topology)
        await asyncio.Event().wait()

    async def Join(
        self,
        requests: AsyncIterator[control_pb2.MemberReport],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[control_pb2.Assignment]:
        async for report in requests:
            self.reports.append(report)
            yield control_pb2.Assignment(lease_ms=3000)


async def orchestrate(*members: MemberInfo) -> tuple[grpc.aio.Server, str, Orchestrator]:
    servicer = Orchestrator(*members)
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    control_pb2_grpc.add_OrchestratorServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}", servicer


async def test_process_is_ready_with_a_decoder_and_without_an_encoder(
    tiny_checkpoint: Path,
) -> None:
    async with running(tiny_checkpoint) as behind:
        decoder = await behind.add_decoder()
        member = MemberInfo(
            member_id="d", role=Role.DECODER, address=decoder.address, state=MemberState.READY
        )
        server, address, servicer = await orchestrate(member)
        flags = ["--model", str(tiny_checkpoint), "--orchestrator", address]
        with processes.running("chiasm.services.gateway", *flags) as process:
            async with AsyncClient(process.address, timeout_s=20.0) as client:
                await client.wait_ready(20)
                result = await client.complete("Hello!")
                assert list(result.token_ids) == decoder.token_ids
                assert (await client.get_model()).name == tiny_checkpoint.name
            assert servicer.reports[-1].state == control_pb2.MEMBER_STATE_READY
        await server.stop(None)


async def test_process_without_decoders_is_not_ready(tiny_checkpoint: Path) -> None:
    server, address, _ = await orchestrate()
    flags = ["--model", str(tiny_checkpoint), "--orchestrator", address]
    with processes.running("chiasm.services.gateway", *flags) as process:
        async with AsyncClient(process.address) as client:
            with pytest.raises(errors.Unavailable):
                await client.wait_ready(1.5)
    await server.stop(None)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "tracer", provider.get_tracer("test"))
    return exporter


def _by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {f"{span.kind.name} {span.name}": span for span in exporter.get_finished_spans()}


async def test_spans_of_a_request(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, spans: InMemorySpanExporter
) -> None:
    sampling = Sampling(max_tokens=2, temperature=0.5, seed=3, top_k=4)
    async with AsyncClient(stack.address, timeout_s=20.0) as client:
        await client.complete([user(image(png()), "x")], sampling=sampling)
    found = _by_name(spans)
    client_span, server_span = found["CLIENT chat"], found["SERVER chat tiny"]
    assert server_span.parent is not None
    assert server_span.parent.span_id == client_span.context.span_id
    for name in ("INTERNAL layout", "CLIENT encode image", "CLIENT decode"):
        parent = found[name].parent
        assert parent is not None
        assert parent.span_id == server_span.context.span_id
    attributes = dict(server_span.attributes or {})
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "chiasm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 4,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.image.input_tokens": 6,
        "gen_ai.usage.video.input_tokens": 0,
    }
    assert {key: attributes.get(key) for key in expected} == expected
    modalities = ("text", "image", "video")
    assert attributes["gen_ai.usage.input_tokens"] == sum(
        int(str(attributes[f"gen_ai.usage.{modality}.input_tokens"])) for modality in modalities
    )
    for seen, name in ((decoder, "CLIENT decode"), (encoder, "CLIENT encode image")):
        sent = seen.metadata[0]["traceparent"].split("-")
        assert sent[1:3] == [
            f"{found[name].context.trace_id:032x}",
            f"{found[name].context.span_id:016x}",
        ]


async def test_span_of_a_refused_request(
    stack: Stack, decoder: FakeDecoder, spans: InMemorySpanExporter
) -> None:
    async with AsyncClient(stack.address, timeout_s=20.0) as client:
        with pytest.raises(errors.InvalidArgument):
            await client.complete("x", sampling=Sampling(top_p=2.0))
    span = _by_name(spans)["SERVER chat tiny"]
    assert (span.attributes or {})["error.type"] == "INVALID_ARGUMENT"
    assert not span.status.is_ok
