"""Which name a request goes by, and what becomes of one whose name is in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from gateway.harness import FakeDecoder, finished_event, tokens_event
from gateway.test_validation import chat, text

from chiasm import errors
from chiasm.client import AsyncClient, Started
from chiasm.transport import handover
from chiasm.v1 import decoder_pb2

DecodeEvents = AsyncIterator[decoder_pb2.DecodeEvent]


class Held:
    """An answer that goes on until it is released."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def script(self, _: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)
        await self.release.wait()
        yield finished_event()


async def named(stub: Any, header: str) -> str:
    """The id that a request without one gets, with `header` as its metadata."""
    answers = stub.Generate(chat(text("x")), timeout=20, metadata=(("x-request-id", header),))
    found = [a.started.request_id async for a in answers if a.HasField("started")]
    return str(found[0])


async def test_metadata_name_a_request(decoder: FakeDecoder, stub: Any) -> None:
    assert await named(stub, "from-a-proxy") == "from-a-proxy"
    assert decoder.metadata[0]["x-request-id"] == "from-a-proxy"


@pytest.mark.parametrize("header", ["two words", "x" * 129])
async def test_bad_metadata_are_no_reason_to_refuse(
    header: str, decoder: FakeDecoder, stub: Any
) -> None:
    found = await named(stub, header)
    assert found
    assert found != header
    assert decoder.metadata[0]["x-request-id"] == found


async def test_metadata_in_use_are_no_reason_to_refuse(
    decoder: FakeDecoder, client: AsyncClient, stub: Any
) -> None:
    held = Held()
    decoder.scripts.append(held.script)
    first = client.generate("x", request_id="twin")
    assert isinstance(await anext(first), Started)
    found = await named(stub, "twin")
    assert found
    assert found != "twin"
    held.release.set()
    assert [e async for e in first]


async def test_an_id_in_flight_twice(decoder: FakeDecoder, client: AsyncClient) -> None:
    held = Held()
    decoder.scripts.append(held.script)
    first = client.generate("x", request_id="twin")
    assert isinstance(await anext(first), Started)
    with pytest.raises(errors.AlreadyExists) as caught:
        await client.complete("x", request_id="twin")
    assert caught.value.reason == "REQUEST_IN_FLIGHT"
    held.release.set()
    assert [e async for e in first]
    assert (await client.complete("x", request_id="twin")).finish_reason == "stop"


async def test_an_id_whose_first_call_ends_meanwhile(
    decoder: FakeDecoder, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a client has lost its connection, and comes back at once."""
    monkeypatch.setattr(handover, "TIMEOUT_S", 15.0)
    held = Held()
    decoder.scripts.append(held.script)
    first = client.generate("x", request_id="twin")
    assert isinstance(await anext(first), Started)
    second = asyncio.create_task(client.complete("x", request_id="twin"))
    await asyncio.wait([second], timeout=0.3)
    assert not second.done()
    await first.aclose()  # type: ignore[attr-defined]
    assert (await second).finish_reason == "stop"
