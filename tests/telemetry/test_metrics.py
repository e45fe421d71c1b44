"""What is declared is exported by some service, has a unit and a meaning, and is documented."""

from __future__ import annotations

import urllib.request

import pytest
from metrics_table import DOCUMENT, table
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from chiasm.membership import Role
from chiasm.telemetry import metrics


def test_every_metric_has_a_service() -> None:
    declared = {v for v in vars(metrics).values() if isinstance(v, MetricWrapperBase)}
    exported = [metrics.RPC_SECONDS, *(m for own in metrics.OF_SERVICE.values() for m in own)]
    assert declared == set(exported)
    shared = {metric for metric in declared if exported.count(metric) > 1}
    assert shared == {metrics.EXPERT_TOKENS}  # a decoder with --colocate holds experts, too


def test_every_service_has_metrics() -> None:
    assert set(metrics.OF_SERVICE) == {*Role, "orchestrator"}


@pytest.mark.parametrize("service", metrics.OF_SERVICE)
def test_a_service_exports_its_own_and_nothing_else(service: str) -> None:
    port = metrics.serve("127.0.0.1", 0, service)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = {f.name for f in text_string_to_metric_families(text) if f.name.startswith("chiasm")}
    own = (metrics.RPC_SECONDS, *metrics.OF_SERVICE[service])
    assert families == {metric.describe()[0].name for metric in own}
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


def test_the_document_lists_them() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), "run: python tests/metrics_table.py"
