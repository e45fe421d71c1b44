"""Loads on the wire: what a member reports is what the orchestrator sees."""

from __future__ import annotations

from dataclasses import fields

import pytest

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load, ShardLoad
from chiasm.transport import loads
from chiasm.v1 import control_pb2

SHARDS = (ShardLoad(shard=1, tokens_total=5, compute_s_total=0.5),)


def filled(kind: type[Load]) -> Load:
    """A load with another value in each of its fields."""
    numbers = {field.name: 3 + 2 * i for i, field in enumerate(fields(kind))}
    return kind(**{**numbers, **({"shards": SHARDS} if kind is ExpertLoad else {})})  # type: ignore[arg-type]  # numbers


@pytest.mark.parametrize("kind", [GatewayLoad, EncoderLoad, DecoderLoad, ExpertLoad])
def test_every_field_travels(kind: type[Load]) -> None:
    report = control_pb2.MemberReport()
    loads.attach(filled(kind), report)
    assert loads.detach(control_pb2.MemberReport.FromString(report.SerializeToString())) == filled(
        kind
    )


def test_a_report_without_a_load_says_nothing() -> None:
    assert loads.detach(control_pb2.MemberReport()) is None
