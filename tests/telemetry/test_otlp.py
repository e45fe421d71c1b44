"""What the OTEL_* variables do, good ones and bad ones."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from control.processes import address
from e2e.collector import Span, collecting, spans_of
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import TracerProvider

from chiasm import errors, local
from chiasm.child import Child
from chiasm.telemetry import otlp, traces

ENDPOINT, TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
BAD = {
    "no scheme for http": {ENDPOINT: "collector:4318", PROTOCOL: "http/protobuf"},
    "no host": {ENDPOINT: "http://"},
    "no port for grpc": {ENDPOINT: "http://collector"},
    "port that is none": {ENDPOINT: "http://collector:port"},
    "port out of range": {ENDPOINT: "collector:99999"},
    "broken IPv6": {ENDPOINT: "http://[::1:4317"},
    "another scheme": {TRACES_ENDPOINT: "ftp://collector:21"},
    "words": {ENDPOINT: "not a url"},
    "only colons": {ENDPOINT: ":::"},
    "protocol": {ENDPOINT: "http://collector:4317", PROTOCOL: "http/json"},
    "time-out": {ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_TIMEOUT": "soon"},
    "queue": {ENDPOINT: "http://collector:4317", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No OTEL_* variable is set, and no provider becomes the process's own."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(trace, "set_tracer_provider", lambda _: None)
    return monkeypatch


def configured(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> TracerProvider | None:
    for name, value in variables.items():
        environment.setenv(name, value)
    return traces.configure("test", instance_id="me")


@pytest.mark.parametrize("variables", BAD.values(), ids=BAD)
def test_bad_values_turn_tracing_off_with_one_line(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: dict[str, str]
) -> None:
    assert configured(environment, variables) is None
    lines = [r for r in caplog.records if r.name.startswith("chiasm") and r.levelno >= logging.INFO]
    (line,) = lines
    assert line.levelno == logging.ERROR
    assert line.getMessage().startswith("tracing is off: ")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {ENDPOINT: "", TRACES_ENDPOINT: " "},
        {ENDPOINT: "http://collector:4317", "OTEL_SDK_DISABLED": "True"},
        {ENDPOINT: "http://collector:4317", "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: "nonsense", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_tracing_that_is_not_wanted_is_off_silently(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variables: dict[str, str]
) -> None:
    assert configured(environment, variables) is None
    ours = ("chiasm", "opentelemetry")  # what other libraries log just then is not meant
    assert not [record for record in caplog.records if record.name.startswith(ours)]


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({ENDPOINT: "collector:4317"}, "has no scheme"),
        ({TRACES_ENDPOINT: "http://collector:4318", PROTOCOL: "http/protobuf"}, "has no path"),
        ({ENDPOINT: "collector:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, ""),
        ({ENDPOINT: " http://collector:4317 "}, ""),
        ({ENDPOINT: "https://collector"}, ""),
        ({ENDPOINT: "http://[::1]:4317"}, ""),
    ],
)
def test_doubtful_values_are_used_and_told(
    environment: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variables: dict[str, str],
    complaint: str,
) -> None:
    caplog.set_level(logging.WARNING, logger=otlp.log.name)  # whatever libraries do to the root's
    provider = configured(environment, variables)
    assert provider is not None
    provider.shutdown()
    messages = [r.getMessage() for r in caplog.records if r.name == otlp.log.name]
    assert len(messages) == bool(complaint)
    assert all(complaint in message for message in messages)


def test_resource_and_sampler_come_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    with collecting() as (collector, variables):
        variables |= {
            "OTEL_SERVICE_NAME": "shop",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
            "OTEL_TRACES_SAMPLER": "always_off",
        }
        provider = configured(environment, variables)
        assert provider is not None
        assert provider.resource.attributes["service.name"] == "shop"
        assert provider.resource.attributes["service.instance.id"] == "me"
        assert provider.resource.attributes["deployment.environment"] == "test"
        provider.get_tracer("t").start_span("unwanted").end()
        provider.shutdown()
        environment.setenv("OTEL_TRACES_SAMPLER", "always_on")
        environment.delenv("OTEL_SERVICE_NAME")
        provider = configured(environment, {})
        assert provider is not None
        provider.get_tracer("t").start_span("wanted").end()
        provider.shutdown()
    assert [(span.service, span.name) for span in collector.spans()] == [("chiasm-test", "wanted")]


@contextmanager
def http_collector() -> Iterator[tuple[str, list[tuple[str, Span]]]]:
    """An OTLP receiver over HTTP: its address, and the path and span of what came."""
    got: list[tuple[str, Span]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            got.extend((self.path, span) for span in spans_of(request))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


@pytest.mark.parametrize(
    ("variable", "suffix", "path"),
    [
        (ENDPOINT, "", "/v1/traces"),
        (ENDPOINT, "/", "/v1/traces"),
        (ENDPOINT, "/otel", "/otel/v1/traces"),
        (TRACES_ENDPOINT, "/my/traces", "/my/traces"),
    ],
)
def test_export_over_http(
    environment: pytest.MonkeyPatch, variable: str, suffix: str, path: str
) -> None:
    with http_collector() as (endpoint, got):
        variables = {
            variable: endpoint + suffix,
            PROTOCOL: "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        }
        provider = configured(environment, variables)
        assert provider is not None
        provider.get_tracer("t").start_span("hello").end()
        provider.shutdown()
    assert [(found, span.name) for found, span in got] == [(path, "hello")]


def test_a_service_starts_in_spite_of_a_bad_endpoint(tmp_path: Path) -> None:
    env = {**os.environ, ENDPOINT: "http://collector:port"}
    log = tmp_path / "log"
    child = Child("orchestrator", "chiasm.orchestrator", [], env=env, log_path=log)
    try:
        address(child)
    finally:
        assert child.end(10)
    lines = [json.loads(ln) for ln in log.read_text().splitlines() if not ln.startswith("list")]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert "collector:port" in line["event"]
    assert line["service"] == "orchestrator"


def test_one_name_for_a_stack_is_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    names = ("text-pool-0", "text-pool-1", "vision-pool-0", "decoder")
    found = [local._environment(name)["OTEL_SERVICE_NAME"] for name in names]
    assert found == ["shop-text-pool", "shop-text-pool", "shop-vision-pool", "shop-decoder"]
    assert local._environment("text-pool+3")["OTEL_SERVICE_NAME"] == "shop-text-pool"
    monkeypatch.delenv("OTEL_SERVICE_NAME")
    assert "OTEL_SERVICE_NAME" not in local._environment("decoder")


def test_what_is_for_one_process_or_another_system_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CHIASM_TLS_CA", "CHIASM_TLS_CERT", "CHIASM_METRICS_PORT", "CHIASM_LANE"):
        monkeypatch.setenv(name, "x")
    found = local._environment("decoder")
    assert [name for name in found if name.startswith("CHIASM_T")] == []
    assert "CHIASM_METRICS_PORT" not in found
    assert found["CHIASM_LANE"] == "x"


@pytest.mark.parametrize("value", ["b3", "tracecontext, jaeger"])
def test_propagators_that_are_not_installed_stop_nothing(value: str) -> None:
    code = (
        "from chiasm.telemetry import traces\n"
        "traces.configure('test', instance_id='i')\n"
        "found = traces.extract({'traceparent': '00-' + '1' * 32 + '-' + '2' * 16 + '-01'})\n"
        "with traces.span('x', context=found) as span:\n"
        "    print(traces.inject(span)['traceparent'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OTEL_PROPAGATORS": value},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(f"00-{'1' * 32}-")
    assert "OTEL_PROPAGATORS" in done.stderr


# Spans


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.Unavailable("gone", reason="POOL"), "POOL"),
        (ZeroDivisionError("x"), "ZeroDivisionError"),
        (GeneratorExit(), None),
    ],
)
def test_an_error_marks_the_span_it_leaves(
    environment: pytest.MonkeyPatch, error: BaseException, kind: str | None
) -> None:
    with collecting() as (collector, variables):
        provider = configured(environment, variables)
        assert provider is not None
        environment.setattr(traces, "tracer", provider.get_tracer("t"))
        with pytest.raises(type(error)), traces.span("work"):
            raise error
        provider.shutdown()
    (span,) = collector.spans()
    assert span.attributes.get("error.type") == kind
    assert span.is_error == (kind is not None)
    assert span.attributes.get(traces.CANCELLED, False) == (kind is None)


@pytest.mark.parametrize("traceparent", ["", "00-nonsense-01", f"00-{'0' * 32}-{'1' * 16}-01"])
def test_no_remote_parent_no_span(environment: pytest.MonkeyPatch, traceparent: str) -> None:
    with collecting() as (collector, variables):
        provider = configured(environment, variables)
        assert provider is not None
        environment.setattr(traces, "tracer", provider.get_tracer("t"))
        with traces.remote_child("work", {"traceparent": traceparent}, kind=traces.SERVER):
            pass
        provider.shutdown()
    assert not collector.spans()


def test_the_context_is_passed_on_without_an_exporter() -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    with traces.span("work", context=traces.extract({"traceparent": traceparent})):
        assert dict(traces.metadata("id")) == {"traceparent": traceparent, "x-request-id": "id"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("10.0.0.1:80", {"server.address": "10.0.0.1", "server.port": 80}),
        ("[::1]:80", {"server.address": "::1", "server.port": 80}),
        ("unix:/tmp/x", {"server.address": "unix:/tmp/x"}),
    ],
)
def test_peers(target: str, expected: dict[str, object]) -> None:
    assert traces.peer(target) == expected
