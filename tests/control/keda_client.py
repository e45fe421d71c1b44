"""A client as KEDA has it: upstream's contract, written down anew beside our own .proto."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "externalscaler.ExternalScaler"
TIMEOUT_S = 20.0

_Field = descriptor_pb2.FieldDescriptorProto
STRING, INT64, DOUBLE, BOOL = (
    _Field.TYPE_STRING,
    _Field.TYPE_INT64,
    _Field.TYPE_DOUBLE,
    _Field.TYPE_BOOL,
)

MESSAGES: dict[str, list[tuple[str, int, Any]]] = {
    "IsActiveResponse": [("result", 1, BOOL)],
    "GetMetricSpecResponse": [("metricSpecs", 1, ["MetricSpec"])],
    "MetricSpec": [
        ("metricName", 1, STRING),
        ("targetSize", 2, INT64),
        ("targetSizeFloat", 3, DOUBLE),
    ],
    "GetMetricsRequest": [("scaledObjectRef", 1, "ScaledObjectRef"), ("metricName", 2, STRING)],
    "GetMetricsResponse": [("metricValues", 1, ["MetricValue"])],
    "MetricValue": [
        ("metricName", 1, STRING),
        ("metricValue", 2, INT64),
        ("metricValueFloat", 3, DOUBLE),
    ],
    "ScaledObjectRef": [
        ("name", 1, STRING),
        ("namespace", 2, STRING),
        ("scalerMetadata", 3, ["ScaledObjectRef.ScalerMetadataEntry"]),
    ],
}
"""Fields by message: name, number, and type; the name of a message for one, a list for many."""


def _contract() -> dict[str, Any]:
    """Message classes in a pool of their own, which knows nothing of ours."""
    file = descriptor_pb2.FileDescriptorProto(
        name="keda.proto", package="externalscaler", syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            is_many = isinstance(kind, list)
            label = _Field.LABEL_REPEATED if is_many else _Field.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if isinstance(kind, int):
                added.type = kind  # type: ignore[assignment] # an enum's number
            else:
                added.type = _Field.TYPE_MESSAGE
                added.type_name = f".externalscaler.{kind[0] if is_many else kind}"
    entry = next(m for m in file.message_type if m.name == "ScaledObjectRef").nested_type.add(
        name="ScalerMetadataEntry"
    )
    entry.options.map_entry = True
    for number, field in enumerate(("key", "value"), start=1):
        entry.field.add(name=field, number=number, type=STRING, label=_Field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"externalscaler.{name}") for name in MESSAGES}
    return {name: message_factory.GetMessageClass(found[name]) for name in MESSAGES}


CONTRACT = _contract()


class KedaClient:
    """One scaled object's view of a scaler; use as a context manager."""

    def __init__(self, address: str, **metadata: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._reference = CONTRACT["ScaledObjectRef"](
            name="object", namespace="default", scalerMetadata=metadata
        )

    def __enter__(self) -> KedaClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and all streams."""
        self._channel.close()

    def is_active(self) -> bool:
        return bool(self._unary("IsActive", "IsActiveResponse", self._reference).result)

    def activity(self) -> Iterator[bool]:
        """StreamIsActive, until the channel is closed."""
        for answer in self._stream("StreamIsActive", "IsActiveResponse"):
            yield bool(answer.result)

    def specs(self) -> list[tuple[str, int, float]]:
        answer = self._unary("GetMetricSpec", "GetMetricSpecResponse", self._reference)
        return [(s.metricName, s.targetSize, s.targetSizeFloat) for s in answer.metricSpecs]

    def first_streamed_specs(self) -> list[tuple[str, int, float]]:
        stream = self._stream("StreamMetricSpec", "GetMetricSpecResponse")
        specs = [(s.metricName, s.targetSize, s.targetSizeFloat) for s in next(stream).metricSpecs]
        stream.cancel()
        return specs

    def metrics(self, name: str) -> list[tuple[str, int, float]]:
        request = CONTRACT["GetMetricsRequest"](scaledObjectRef=self._reference, metricName=name)
        answer = self._unary("GetMetrics", "GetMetricsResponse", request)
        return [(v.metricName, v.metricValue, v.metricValueFloat) for v in answer.metricValues]

    def wanted_replicas(self) -> int:
        """What the HPA that KEDA keeps would arrive at: value over target, rounded up."""
        ((name, _, target),) = self.specs()
        ((_, _, value),) = self.metrics(name)
        return -int(-value // target)

    def _unary(self, method: str, answer: str, request: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=CONTRACT[answer].FromString,
        )
        return call(request, timeout=TIMEOUT_S)

    def _stream(self, method: str, answer: str) -> Any:
        call = self._channel.unary_stream(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=CONTRACT[answer].FromString,
        )
        return call(self._reference)
