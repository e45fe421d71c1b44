"""Requests that are no valid messages end with INVALID_ARGUMENT, and the bad field is named.

protobuf refuses to parse a message whose `string` field is not UTF-8 and does not say which field
it was; grpc would turn that into INTERNAL. So a message that fails to parse is parsed again with a
twin of its type in which every `string` is `bytes`, and the twin is searched for the culprit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import (
    Descriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

from chiasm import errors

MAX_SEARCHED = 10_000
"""Strings and messages that are looked at for the culprit. A request may have millions of them; it
is refused all the same, without the name of the field."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a request that could not be parsed, until a handler may raise."""

    error: errors.InvalidArgument


def deserializer(cls: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """A request deserializer that never raises."""

    def parse(data: bytes) -> Message | Malformed:
        try:
            return cls.FromString(data)
        except DecodeError:
            return Malformed(explain(cls, data))

    return parse


def explain(cls: type[Message], data: bytes) -> errors.InvalidArgument:
    """Why `data` is no message of `cls`, with the path of the first string that is not UTF-8 if it
    is among the first MAX_SEARCHED entries."""
    original = cast(Descriptor, cls.DESCRIPTOR)
    twin = _twin(original)
    try:
        message = twin.FromString(data)
    except DecodeError:
        return errors.InvalidArgument("", f"the request is not a {original.full_name} message")
    searched = itertools.islice(_entries(message, original, ""), MAX_SEARCHED)
    path = next((path for path, data in searched if not _is_utf8(data)), "")
    return errors.InvalidArgument(path, "the text is not valid UTF-8")


def handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler[Any, Any]:
    """The generated handlers of a service without client streams, but with `deserializer`."""
    methods = {method.name: _handler(method, servicer) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _handler(method: MethodDescriptor, servicer: object) -> grpc.RpcMethodHandler[Any, Any]:
    behavior: Any = getattr(servicer, method.name)
    answer_cls = message_factory.GetMessageClass(method.output_type)

    async def unary(request: Any, context: Context) -> Any:
        if isinstance(request, Malformed):
            raise request.error
        return await behavior(request, context)

    def stream(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        # The behaviour's own generator: what is thrown into it must find it where it waits.
        if isinstance(request, Malformed):
            return _refused(request.error)
        answers: AsyncGenerator[Any, None] = behavior(request, context)
        return answers

    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        stream if method.server_streaming else unary,
        request_deserializer=deserializer(message_factory.GetMessageClass(method.input_type)),
        response_serializer=answer_cls.SerializeToString,
    )


async def _refused(error: errors.InvalidArgument) -> AsyncGenerator[Any, None]:
    raise error
    yield


@functools.cache
def _twin(original: Descriptor) -> type[Message]:
    pool = DescriptorPool()
    _add_twin(pool, original.file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(original.full_name))


def _add_twin(pool: DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add_twin(pool, dependency, added)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    del proto.service[:]
    pending = list(proto.message_type)
    while pending:
        message = pending.pop()
        pending.extend(message.nested_type)
        for field in message.field:
            if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool.Add(proto)


def _entries(twin: Message, original: Descriptor, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Paths of the strings of `original` and their bytes in `twin`, in field order; those of the
    messages around them, with no bytes, so that whoever counts counts them too."""
    for field, value in twin.ListFields():
        of_original = original.fields_by_name[field.name]
        inner = of_original.message_type
        if inner is None and of_original.type != FieldDescriptor.TYPE_STRING:
            continue
        if inner is not None and inner.GetOptions().map_entry:
            continue  # the maps of the contracts hold numbers
        is_repeated = not isinstance(value, (bytes, Message))
        for i, entry in enumerate(value if is_repeated else (value,)):
            path = f"{prefix}{field.name}[{i}]" if is_repeated else f"{prefix}{field.name}"
            if inner is None:
                yield path, entry
            else:
                yield path, b""
                yield from _entries(entry, inner, f"{path}.")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
