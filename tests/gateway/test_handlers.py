"""What the gateway's handlers add to its methods must not come between them and their callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from chiasm import errors
from chiasm.services.gateway import utf8
from chiasm.services.gateway.__main__ import SERVICE
from chiasm.v1 import inference_pb2 as pb


async def test_a_stream_that_nobody_reads_ends_as_the_method_says() -> None:
    """Cancelled while it waits at its yield, the method may know why: its own deadline."""

    async def generate(_: object, __: object) -> AsyncIterator[int]:
        try:
            yield 1
        except asyncio.CancelledError:
            raise errors.DeadlineExceeded("too late") from None

    method = SERVICE.methods_by_name["Generate"]
    handler: Any = utf8._handler(method, SimpleNamespace(Generate=generate))
    answers = handler.unary_stream(pb.GenerateRequest(), None)
    assert await anext(answers) == 1
    with pytest.raises(errors.DeadlineExceeded):
        await answers.athrow(asyncio.CancelledError())
