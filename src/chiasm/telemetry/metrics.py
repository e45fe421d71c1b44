"""Every Prometheus metric of every service, declared once; a process exports those it touches."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

LATENCY_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5,
    0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip

RPC_SECONDS = Histogram(
    "chiasm_rpc_duration_seconds",
    "Server-side duration of calls.",
    ["method", "outcome"],
    buckets=LATENCY_BUCKETS,
)


def serve(host: str, port: int) -> int:
    """Starts the /metrics endpoint (port 0: any free one); returns its port."""
    server, _ = start_http_server(port, addr=host)
    return int(server.server_port)


__all__ = ["LATENCY_BUCKETS", "RPC_SECONDS", "Counter", "Gauge", "Histogram", "serve"]
