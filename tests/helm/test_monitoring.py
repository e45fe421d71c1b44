"""Alerts that fire when they should, and dashboards that ask for metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.rendering import CHART, NAME, NAMESPACE, RELEASE, rendered
from helm.tools import promtool
from prometheus_client import Counter, Histogram

from chiasm.telemetry import metrics

OURS = f'app_kubernetes_io_instance="{RELEASE}",namespace="{NAMESPACE}"'
DASHBOARDS = sorted((CHART / "files/dashboards").glob("*.json"))
INTERVAL_S = 60


def known_series() -> dict[str, set[str]]:
    """Names of time series that the services export, with their labels."""
    found: dict[str, set[str]] = {"up": set()}
    exported = {m for of_service in metrics.OF_SERVICE.values() for m in of_service}
    for metric in {*exported, metrics.RPC_SECONDS}:
        (family,) = metric.describe()
        labels = set(metric._labelnames)
        suffixes = [""]
        if isinstance(metric, Counter):
            suffixes = ["_total"]
        elif isinstance(metric, Histogram):
            suffixes = ["_bucket", "_sum", "_count"]
        for suffix in suffixes:
            found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def used_series(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Names in an expression, each with the labels it selects or groups by."""
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    by = {label.strip() for labels in grouped for label in labels.split(",")}
    for name, selector in re.findall(r"\b(chiasm_\w+|up)(?:\{([^}]*)\})?", expression):
        yield name, by | set(re.findall(r"(\w+)(?==|!)", selector))


OF_THE_TARGET = {"app_kubernetes_io_instance", "app_kubernetes_io_component", "namespace", "pod"}
"""Labels that the scrape adds."""


def check_names(expression: str) -> None:
    series = known_series()
    for name, labels in used_series(expression):
        assert name in series, f"{name} is no metric: {expression}"
        unknown = labels - OF_THE_TARGET - {label for s in series.values() for label in s}
        assert not unknown, f"{unknown}: {expression}"


@pytest.fixture(scope="module")
def rules() -> Any:
    found = rendered("metrics.rules.enabled=true")
    return found[f"PrometheusRule/{NAME}"]["spec"]


def expressions(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def substituted(expression: str) -> str:
    """An expression as Grafana sends it."""
    filled = expression.replace("$__rate_interval", "5m")
    return filled.replace("$namespace", NAMESPACE).replace("$release", RELEASE)


def run_promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [promtool(), *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_every_metric_of_an_alert_exists(rules: Any) -> None:
    (group,) = rules["groups"]
    assert len(group["rules"]) >= 12
    for rule in group["rules"]:
        check_names(rule["expr"])
        assert OURS in rule["expr"]
        assert "OURS" not in str(rule)
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_asks_for_metrics_that_exist(dashboard: Path, tmp_path: Path) -> None:
    found = expressions(dashboard)
    assert len(found) >= 15
    for expression in found:
        check_names(expression)
        assert 'namespace="$namespace"' in expression
    # The parser of Prometheus itself, through a file of recording rules.
    recorded = [
        {"record": f"panel:{i}", "expr": substituted(expression)}
        for i, expression in enumerate(found)
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    done = run_promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_config_maps(dashboard: Path) -> None:
    found = rendered('metrics.dashboards={"enabled":true,"labels":{"grafana_dashboard":"1"}}')
    config = found[f"ConfigMap/{NAME}-{dashboard.stem}-dashboard"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = config["data"].values()
    assert json.loads(text) == json.loads(dashboard.read_text())
    identities = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(identities) == len(set(identities))


def test_the_check_of_names_can_fail() -> None:
    with pytest.raises(AssertionError):
        check_names("sum(chiasm_no_such_metric)")
    with pytest.raises(AssertionError):
        check_names('chiasm_members{rolle="decoder"}')


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    ours = {"app_kubernetes_io_instance": RELEASE, "namespace": NAMESPACE, **labels}
    inside = ",".join(f'{key}="{value}"' for key, value in ours.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


HOUR = "x60"
FIRING: dict[str, list[dict[str, str]]] = {
    "ChiasmShardMissing": [
        series("chiasm_pool_shards_missing", f"0+0{HOUR}", modality="text", pod="follower"),
        series("chiasm_pool_shards_missing", f"2+0{HOUR}", modality="text", pod="leader"),
    ],
    "ChiasmNoLeader": [series("chiasm_orchestrator_leads", f"0+0{HOUR}", pod="a")],
    "ChiasmTargetDown": [series("up", f"0+0{HOUR}", pod="a")],
    "ChiasmRequestsFail": [
        series("chiasm_requests_accepted_total", f"0+60{HOUR}"),
        series("chiasm_requests_failed_total", f"0+6{HOUR}", reason="DECODER_UNAVAILABLE"),
    ],
    "ChiasmDeadlinesPass": [
        series("chiasm_requests_accepted_total", f"0+60{HOUR}"),
        series("chiasm_requests_failed_total", f"0+6{HOUR}", reason="DEADLINE_EXCEEDED"),
    ],
    "ChiasmRequestsRefused": [
        series(
            "chiasm_rpc_duration_seconds_count",
            f"0+60{HOUR}",
            method="/chiasm.v1.Inference/Generate",
            outcome="ResourceExhausted",
        )
    ],
    "ChiasmDecodersAreLost": [series("chiasm_request_resumes_total", f"0+1{HOUR}")],
    "ChiasmFirstTokenSlow": [
        series("chiasm_time_to_first_token_seconds_bucket", f"0+1{HOUR}", le="10"),
        series("chiasm_time_to_first_token_seconds_bucket", f"0+9{HOUR}", le="20"),
        series("chiasm_time_to_first_token_seconds_bucket", f"0+9{HOUR}", le="+Inf"),
    ],
    "ChiasmTokensSlow": [
        series("chiasm_inter_token_seconds_bucket", f"0+1{HOUR}", le="0.5"),
        series("chiasm_inter_token_seconds_bucket", f"0+9{HOUR}", le="1"),
        series("chiasm_inter_token_seconds_bucket", f"0+9{HOUR}", le="+Inf"),
    ],
    "ChiasmKvCacheFull": [
        series("chiasm_decoder_kv_used_tokens", f"99+0{HOUR}", pod="a"),
        series("chiasm_decoder_kv_capacity_tokens", f"100+0{HOUR}", pod="a"),
        series("chiasm_decoder_waiting_requests", f"1+0{HOUR}", pod="a"),
    ],
    "ChiasmEncoderBacklog": [
        series("chiasm_encoder_queued_patches", f"6000+0{HOUR}"),
        series("chiasm_encoder_patches_total", f"0+6000{HOUR}", kind="image"),
    ],
    "ChiasmExpertsQueue": [
        series("chiasm_dispatch_queue_seconds_bucket", f"0+1{HOUR}", le="0.25", modality="text"),
        series("chiasm_dispatch_queue_seconds_bucket", f"0+9{HOUR}", le="0.5", modality="text"),
        series("chiasm_dispatch_queue_seconds_bucket", f"0+9{HOUR}", le="+Inf", modality="text"),
    ],
    "ChiasmDispatchesFail": [
        series("chiasm_dispatch_failures_total", f"0+120{HOUR}", modality="text", reason="X")
    ],
    "ChiasmMemberStuck": [series("chiasm_members", f"1+0{HOUR}", role="decoder", state="loading")],
    "ChiasmLedgerDoesNotBalance": [
        series("chiasm_requests_accepted_total", f"5+0{HOUR}"),
        series("chiasm_requests_finished_total", f"2+0{HOUR}", reason="stop"),
        series("chiasm_requests_failed_total", f"1+0{HOUR}", reason="CANCELLED"),
        series("chiasm_requests_in_flight", f"1+0{HOUR}"),
    ],
}
"""For each alert, an hour in which it fires."""

PEACE = [
    series("chiasm_orchestrator_leads", f"1+0{HOUR}", pod="a"),
    series("chiasm_orchestrator_leads", f"0+0{HOUR}", pod="b"),
    series("chiasm_pool_shards_missing", f"0+0{HOUR}", modality="text"),
    series("chiasm_pool_shards_missing", "0+0x48 8+0x12", modality="vision"),  # it was woken
    series("up", f"1+0{HOUR}", pod="a"),
    series("chiasm_requests_accepted_total", f"0+60{HOUR}"),
    series("chiasm_requests_finished_total", f"0+54{HOUR}", reason="stop"),
    series("chiasm_requests_failed_total", f"0+1{HOUR}", reason="INVALID_ARGUMENT"),
    series("chiasm_requests_failed_total", f"0+5{HOUR}", reason="KV_CACHE_TOO_SMALL"),
    series("chiasm_requests_in_flight", f"0+0{HOUR}"),
    series("chiasm_request_resumes_total", f"3+0{HOUR}"),
    series("chiasm_time_to_first_token_seconds_bucket", f"0+9{HOUR}", le="1"),
    series("chiasm_time_to_first_token_seconds_bucket", f"0+9{HOUR}", le="+Inf"),
    series("chiasm_decoder_kv_used_tokens", f"99+0{HOUR}"),
    series("chiasm_decoder_kv_capacity_tokens", f"100+0{HOUR}"),
    series("chiasm_decoder_waiting_requests", f"0+0{HOUR}"),
    series("chiasm_encoder_queued_patches", f"600+0{HOUR}"),
    series("chiasm_encoder_patches_total", f"0+6000{HOUR}", kind="image"),
    series("chiasm_members", f"1+0{HOUR}", role="decoder", state="ready"),
    series("chiasm_members", f"0+0{HOUR}", role="decoder", state="loading"),
]
"""An hour in which nothing is wrong."""


def test_alerts_fire_when_they_should_and_only_then(rules: Any, tmp_path: Path) -> None:
    """promtool plays every hour through the rules as they are installed."""
    (group,) = rules["groups"]
    alerts = {rule["alert"]: rule for rule in group["rules"]}
    assert set(FIRING) == set(alerts)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    leading = series("chiasm_orchestrator_leads", f"1+0{HOUR}", pod="a")
    tests = [
        {
            "name": name,
            "interval": f"{INTERVAL_S}s",
            "input_series": hour if name == "ChiasmNoLeader" else [*hour, leading],
            # A count of series rather than the whole alert: the texts are free to change.
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                    "eval_time": "55m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for name, hour in FIRING.items()
    ]
    quiet = [
        {
            "name": "peace",
            "interval": f"{INTERVAL_S}s",
            "input_series": PEACE,
            "promql_expr_test": [
                {"expr": 'count(ALERTS{alertstate="firing"})', "eval_time": "55m"}
            ],
        }
    ]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests + quiet}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(document))
    done = run_promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
