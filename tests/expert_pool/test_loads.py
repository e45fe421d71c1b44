"""What a server says it has done: to Prometheus, to whoever asks, and to the orchestrator."""

from __future__ import annotations

import torch
from prometheus_client import Counter

from chiasm.services.expert_pool.loads import Loads
from chiasm.telemetry import metrics
from chiasm.types import Modality


def counted(metric: Counter) -> dict[str, float]:
    """A counter of the vision bank by its other label."""
    return {
        label: sample.value
        for family in metric.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["modality"] == "vision"
        for name, label in sample.labels.items()
        if name != "modality"
    }


def test_all_are_told_the_same() -> None:
    """Four shards of two experts each; of three tokens' choices, one is of another shard."""
    watched = (
        metrics.SHARD_TOKENS,
        metrics.SHARD_COMPUTE_SECONDS,
        metrics.EXPERT_TOKENS,
        metrics.EXPERT_COMPUTE_SECONDS,
    )
    before = [counted(metric) for metric in watched]
    loads = Loads(Modality.VISION, num_shards=4, num_experts=8)
    loads.add(1, tokens=2, compute_ns=500_000_000)
    loads.add(1, tokens=1, compute_ns=250_000_000)
    loads.add(3, tokens=3, compute_ns=125_000_000)
    spent = torch.tensor([0, 0, 500, 0, 0, 0, 250, 125]) * 1_000_000
    loads.add_dispatch((1, 3), torch.tensor([[2, 6], [2, 7], [0, 6]], dtype=torch.int32), spent)

    expected = {1: (3, 0.75), 3: (3, 0.125)}
    told = {x.shard: (x.tokens, x.compute_ns / 1e9) for x in loads.to_proto()}
    reported = loads.report(queued=5)
    assert told == expected
    assert {x.shard: (x.tokens_total, x.compute_s_total) for x in reported.shards} == expected
    assert reported.queued_dispatches == 5
    tokens, seconds, experts, expert_seconds = (
        {label: value - old.get(label, 0) for label, value in counted(metric).items()}
        for metric, old in zip(watched, before, strict=True)
    )
    assert {int(label): (tokens[label], seconds[label]) for label in tokens if tokens[label]} == (
        expected
    )
    assert {label: count for label, count in experts.items() if count} == {"2": 2, "6": 2, "7": 1}
    assert {label: seconds for label, seconds in expert_seconds.items() if seconds} == {
        "2": 0.5,
        "6": 0.25,
        "7": 0.125,
    }
