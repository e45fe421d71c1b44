"""The errors services raise, independent of grpc; transport/status.py maps them to statuses.

    ChiasmError
    ├── InvalidArgument      a field of the request is wrong; retrying cannot help
    ├── NotFound             a named thing is not here (reason tells which)
    ├── AlreadyExists        the request id is in flight
    ├── FailedPrecondition   the call does not fit the server's state
    ├── ResourceExhausted    a bound was reached; come back after retry_after_s
    ├── Unavailable          a part of the system is away; come back after retry_after_s
    ├── DeadlineExceeded     the caller's time ran out
    ├── DataLoss             a checksum did not match
    ├── Unauthenticated      the caller has not shown who it is
    └── Internal             a defect of ours

`reason` is a stable machine-readable word; docs/errors.md lists all of them.
"""

from __future__ import annotations

from typing import ClassVar

DRAINING = "DRAINING"
"""Reason of Unavailable from a service that is shutting down."""

EMBEDDING_EVICTED = "EMBEDDING_EVICTED"
"""Reason of NotFound for embeddings that no encoder holds any more: they have to be made again."""

EXPERT_POOL_UNAVAILABLE = "EXPERT_POOL_UNAVAILABLE"
"""Reason of Unavailable from a decoder that has waited for an expert pool in vain."""


class ChiasmError(Exception):
    """Base of all domain errors.

    `code` is a google.rpc.Code number, `reason` the ErrorInfo.reason on the wire.
    """

    code: ClassVar[int] = 13
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidArgument(ChiasmError):
    """A field of the request is wrong; `field` is its path, as `chat.messages[0].role`."""

    code = 3
    default_reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message, field=field)
        self.description = message


class DeadlineExceeded(ChiasmError):
    """The caller's time ran out before the work was done."""

    code = 4
    default_reason = "DEADLINE_EXCEEDED"


class NotFound(ChiasmError):
    """A named thing is not held here."""

    code = 5
    default_reason = "NOT_FOUND"


class AlreadyExists(ChiasmError):
    """The name is taken."""

    code = 6
    default_reason = "ALREADY_EXISTS"


class ResourceExhausted(ChiasmError):
    """A queue or cache is full."""

    code = 8
    default_reason = "RESOURCE_EXHAUSTED"


class FailedPrecondition(ChiasmError):
    """The server's state does not allow the call."""

    code = 9
    default_reason = "FAILED_PRECONDITION"


class Internal(ChiasmError):
    """A defect of ours."""


class Unavailable(ChiasmError):
    """A part of the system is away; the call may be repeated."""

    code = 14
    default_reason = "UNAVAILABLE"


class DataLoss(ChiasmError):
    """A payload does not match its checksum."""

    code = 15
    default_reason = "DATA_LOSS"


class Unauthenticated(ChiasmError):
    """The caller brings no API key, or one that is not known."""

    code = 16
    default_reason = "UNAUTHENTICATED"


_CANCELLED = 1
_BY_CODE: dict[int, type[ChiasmError]] = {
    # By the peer: whoever gives a call up himself hears of no status.
    _CANCELLED: Unavailable,
} | {
    cls.code: cls
    for cls in (
        DeadlineExceeded,
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        FailedPrecondition,
        Internal,
        Unavailable,
        DataLoss,
        Unauthenticated,
    )
}


def from_code(
    code: int,
    message: str,
    *,
    reason: str | None = None,
    field: str = "",
    retry_after_s: float | None = None,
) -> ChiasmError:
    """The error a status stands for; codes outside the tree become Internal."""
    if code == InvalidArgument.code:
        return InvalidArgument(field, message.removeprefix(f"{field}: "))
    cls = _BY_CODE.get(code, Internal)
    return cls(message, reason=reason, field=field, retry_after_s=retry_after_s)
