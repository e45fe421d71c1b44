"""A server whose answers are no messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from loopback import listening

NONSENSE = b"\xff"


@asynccontextmanager
async def nonsense(service: str, answers: Mapping[str, bytes]) -> AsyncIterator[str]:
    """Serves the methods of `answers`, each with these bytes once for a request; yields where."""

    def handler(answer: bytes) -> grpc.RpcMethodHandler:
        async def send(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
            async for _ in requests:
                yield answer

        return grpc.stream_stream_rpc_method_handler(send)

    handlers = {name: handler(answer) for name, answer in answers.items()}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    async with listening(server) as address:
        yield address
