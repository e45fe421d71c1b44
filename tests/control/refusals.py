"""What an orchestrator refuses a member's reports with."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from lost_status import told

from chiasm import errors
from chiasm.transport import status
from chiasm.v1 import control_pb2, control_pb2_grpc


async def refusal(
    channel: grpc.aio.Channel, *reports: control_pb2.MemberReport, timeout_s: float
) -> errors.ChiasmError:
    """The error of a Join with these reports, each of them answered but the last."""

    async def report() -> None:
        # Not half-closed: where the refusal is faster than that, gRPC's client says INTERNAL.
        call = control_pb2_grpc.OrchestratorStub(channel).Join(timeout=timeout_s)
        for each in reports:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(each)
            await call.read()

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await told(report)
    return status.from_rpc_error(refused.value)
