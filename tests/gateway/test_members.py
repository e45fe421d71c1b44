"""What a gateway makes of the end of a call to another member."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from chiasm import errors
from chiasm.services.gateway.members import BrokenOff, call_error, may_try_another
from chiasm.transport import status
from chiasm.transport.accepted import accept

Metadata = tuple[tuple[str, str], ...]


class Call:
    """Both sides of one that has ended: what the member sends, and what of it is received."""

    def __init__(self, *received: str) -> None:
        self._received = received
        self._sent: dict[str, Metadata] = {}

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._sent["initial"] = metadata

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._sent["trailing"] = metadata

    async def initial_metadata(self) -> Metadata | None:
        return self._sent["initial"] if "initial" in self._received else None

    async def trailing_metadata(self) -> Metadata | None:
        return self._sent["trailing"] if "trailing" in self._received else None


def failure(code: grpc.StatusCode, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "Internal error from Core"
    )


@pytest.mark.parametrize("received", [(), ("initial",), ("trailing",), ("initial", "trailing")])
async def test_a_status_that_grpc_has_lost_says_nothing_of_the_request(
    received: tuple[str, ...],
) -> None:
    """A refusal that met what was still being written to the member. That the request was in hand
    is known from either end of the call: one that dies says no more, and grpc may lose a beginning.
    """
    call: Any = Call(*received)
    await accept(call)
    error = await call_error(call, failure(grpc.StatusCode.INTERNAL))
    assert may_try_another(error)
    assert isinstance(error, BrokenOff) is bool(received)


async def test_a_members_own_internal_error_is_final() -> None:
    details = status.to_proto(errors.Internal("a defect")).SerializeToString()
    ended = failure(grpc.StatusCode.INTERNAL, (status.DETAILS_KEY, details))
    error = await call_error(Call(), ended)  # type: ignore[arg-type]  # a stand-in
    assert isinstance(error, errors.Internal)
    assert not may_try_another(error)
