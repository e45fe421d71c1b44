"""Calls of the decoder before an engine that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from pydantic import ValidationError

from chiasm.model.config import ModelConfig
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.decoder.sequence import Sequence, TokenEvent
from chiasm.services.decoder.servicer import MAX_UNREAD, DecoderServicer
from chiasm.v1 import decoder_pb2


class Engine:
    """Takes sequences and does nothing with them."""

    def __init__(self) -> None:
        self.submitted: asyncio.Queue[Sequence] = asyncio.Queue()
        self.aborted: list[Sequence] = []

    def load(self) -> Any:
        return SimpleNamespace(kv_tokens_total=1 << 20)

    def submit(self, sequence: Sequence) -> None:
        self.submitted.put_nowait(sequence)

    def abort(self, sequence: Sequence) -> None:
        self.aborted.append(sequence)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def answers(tiny_checkpoint: Path, engine: Any) -> AsyncIterator[decoder_pb2.DecodeEvent]:
    """A call that has not begun yet."""
    config = ModelConfig.load(tiny_checkpoint)
    servicer = DecoderServicer(config, embeddings=Mock(), grammars=Mock())
    servicer.engine = engine
    request = decoder_pb2.DecodeRequest(token_ids=[5, 6, 7], token_types=bytes(3))
    return servicer.Decode(request, AsyncMock())


async def test_a_call_that_is_cancelled_has_left_the_engine_when_it_ends(
    answers: Any, engine: Engine
) -> None:
    first = asyncio.create_task(anext(answers))
    sequence = await engine.submitted.get()
    sequence.sink(TokenEvent(token_id=9))
    assert list((await first).tokens.token_ids) == [9]
    with pytest.raises(asyncio.CancelledError):
        await answers.athrow(asyncio.CancelledError())
    assert engine.aborted == [sequence]


async def test_what_is_not_read_holds_the_engine_back(answers: Any, engine: Engine) -> None:
    first = asyncio.create_task(anext(answers))
    sequence = await engine.submitted.get()
    for _ in range(1 + MAX_UNREAD):
        assert not sequence.is_behind()
        sequence.sink(TokenEvent(token_id=9))
        await asyncio.sleep(0)
    await first
    assert sequence.is_behind()
    await anext(answers)
    assert not sequence.is_behind()
    await answers.aclose()


def test_a_step_has_room_for_a_prompt_whoever_decodes(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--max-step-tokens"):
        DecoderSettings(model=tmp_path, max_running=8, max_step_tokens=8)
    DecoderSettings(model=tmp_path, max_running=8, max_step_tokens=9)
