"""What a gateway makes of the end of a call to another member."""

from __future__ import annotations

import grpc
import pytest

from chiasm import errors
from chiasm.services.gateway.members import BrokenOff, call_error, may_try_another
from chiasm.transport import status
from chiasm.transport.messages import ACCEPTED_KEY


class Call:
    """One that has ended."""

    def __init__(self, *initial_metadata: tuple[str, str]) -> None:
        self._initial_metadata = initial_metadata

    async def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._initial_metadata


def failure(code: grpc.StatusCode, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "Internal error from Core"
    )


@pytest.mark.parametrize("accepted", [False, True])
async def test_a_status_that_grpc_has_lost_says_nothing_of_the_request(accepted: bool) -> None:
    """A refusal that met what was still being written to the member."""
    call = Call(*([(ACCEPTED_KEY, "1")] if accepted else []))
    error = await call_error(call, failure(grpc.StatusCode.INTERNAL))  # type: ignore[arg-type]  # a stand-in
    assert may_try_another(error)
    assert isinstance(error, BrokenOff) is accepted


async def test_a_members_own_internal_error_is_final() -> None:
    details = status.to_proto(errors.Internal("a defect")).SerializeToString()
    ended = failure(grpc.StatusCode.INTERNAL, (status.DETAILS_KEY, details))
    error = await call_error(Call(), ended)  # type: ignore[arg-type]  # a stand-in
    assert isinstance(error, errors.Internal)
    assert not may_try_another(error)
