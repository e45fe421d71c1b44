"""The gateway's backend against a client that answers by itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from chiasm.bench.backend import Done, Tokens
from chiasm.bench.grpc_backend import Form, GrpcBackend, Ids
from chiasm.bench.workload import Passage, Turn
from chiasm.client import Delta, Event, Finished, Timings, Usage

ANSWER = [
    Delta(text="", token_ids=(4,)),  # half a character
    Delta(text="", reasoning_text="é", token_ids=(5,)),
    Delta(text="b", token_ids=(6, 7)),
]


class FakeClient:
    async def generate(self, *_: object, **__: object) -> AsyncGenerator[Event, None]:
        for delta in ANSWER:
            yield delta
        yield Finished(
            reason="stop",
            usage=Usage(**dict.fromkeys(Usage.__slots__, 4)),
            timings=Timings(**dict.fromkeys(Timings.__slots__, 0)),
        )


@pytest.mark.parametrize(("form", "heard"), [("tokens", [1, 1, 2]), ("chat", [1, 2])])
async def test_what_counts_as_a_chunk(form: Form, heard: list[int]) -> None:
    """In a chat, as over HTTP, only what has text."""
    connection: Any = FakeClient()
    ids = Ids(low=3, high=9, picture=None)
    backend = GrpcBackend(connection, form=form, ids=ids, temperature=0, ignore_eos=True)
    call = backend.prepare((), Turn(passage=Passage((1,), 3), max_tokens=4))
    events = [event async for event in call(1.0)]
    assert [event.num_tokens for event in events if isinstance(event, Tokens)] == heard
    assert isinstance(events[-1], Done)
