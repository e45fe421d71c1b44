"""Domain errors to grpc statuses with google.rpc details, and back. The only place that does it."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from chiasm import errors

_M = TypeVar("_M")

DOMAIN = "chiasm"
DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def to_proto(error: errors.ChiasmError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where known."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, errors.InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.description
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code, message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.ChiasmError) -> NoReturn:
    """Ends the call with the error's status."""
    status = to_proto(error)
    trailing = (*context.trailing_metadata(), (DETAILS_KEY, status.SerializeToString()))
    await context.abort(_CODES[error.code], error.message, trailing)
    raise AssertionError("abort raises")


def from_rpc_error(error: grpc.RpcError, peer: str = "") -> errors.ChiasmError:
    """The domain error a failed call stands for; without a reason of its own, the status's name.

    peer: who was called; it is named where no handler has said what went wrong, but grpc itself.
    """
    code, message = error.code().value[0], error.details() or ""
    if peer and not has_details(error):
        message = f"{peer}: {message}"
    reason, field, retry_after_s = error.code().name, "", None
    for detail in _details(error):
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return errors.from_code(code, message, reason=reason, field=field, retry_after_s=retry_after_s)


def parsed(message: _M | None, sender: str) -> _M:
    """The message; grpc hands out None for one that it cannot parse. Raises DataLoss."""
    if message is None:
        raise errors.DataLoss(f"{sender} sent what is not a message")
    return message


def has_details(error: grpc.RpcError) -> bool:
    """Whether a handler has said what went wrong; otherwise it was grpc itself."""
    return bool(_details(error))


def _details(error: grpc.RpcError) -> list[any_pb2.Any]:
    trailing = cast("tuple[tuple[str, bytes], ...]", error.trailing_metadata() or ())
    for key, value in trailing:
        if key == DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                return []
            return list(status.details)
    return []
