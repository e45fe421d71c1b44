"""The table of metrics in docs/observability.md, made from their declarations.

python tests/metrics_table.py writes it anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from chiasm.telemetry import metrics

DOCUMENT = Path(__file__).parents[1] / "docs/observability.md"

_MARKED = re.compile(r"<!-- metrics -->\n.*?<!-- end -->\n", re.DOTALL)


def table() -> str:
    """The table in Markdown, between its marks: metrics by the service that exports them."""
    rows = [_row(metrics.RPC_SECONDS, "all")]
    rows += [_row(m, service) for service, own in metrics.OF_SERVICE.items() for m in own]
    head = ["| service | metric | type | labels | meaning |", "|---|---|---|---|---|"]
    return "\n".join(["<!-- metrics -->", *head, *rows, "<!-- end -->", ""])


def with_table(text: str) -> str:
    """The document with the table as it should be. Raises ValueError when it has no place."""
    text, count = _MARKED.subn(lambda _: table(), text)
    if count != 1:
        raise ValueError(f"{DOCUMENT.name} has {count} places for the table")
    return text


def _row(metric: MetricWrapperBase, service: str) -> str:
    (family,) = metric.describe()
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| {service} | `{name}` | {family.type} | {labels} | {family.documentation} |"


def main() -> None:
    """Rewrites the document."""
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
