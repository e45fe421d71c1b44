"""What an orchestrator refuses a member's reports with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from chiasm import errors
from chiasm.transport import status
from chiasm.v1 import control_pb2, control_pb2_grpc

ATTEMPTS = 10


async def refusal(
    channel: grpc.aio.Channel, *reports: control_pb2.MemberReport, timeout_s: float
) -> errors.ChiasmError:
    """The error of a Join with these reports, each of them answered but the last."""
    for _ in range(ATTEMPTS):
        # Not half-closed: where the refusal is faster than that, gRPC's client says INTERNAL.
        call = control_pb2_grpc.OrchestratorStub(channel).Join(timeout=timeout_s)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _report(call, reports)
        # And where it is faster than the report, the failed write takes the status's place.
        if status.has_details(refused.value):
            break
    return status.from_rpc_error(refused.value)


async def _report(call: Any, reports: Sequence[control_pb2.MemberReport]) -> None:
    for report in reports:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(report)
        await call.read()
