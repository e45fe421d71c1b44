"""Decoder over gRPC: decode the request, run it, stream its events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import grpc
import structlog
import torch
from opentelemetry import context as otel_context

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.positions import position_ids
from chiasm.services.decoder import wire
from chiasm.services.decoder.embeddings import EmbeddingStore
from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.grammars import Grammars
from chiasm.services.decoder.sequence import (
    Event,
    FailedEvent,
    FinishedEvent,
    MediaRows,
    PromptLogitsEvent,
    PromptLogprobsEvent,
    Sequence,
    TokenEvent,
)
from chiasm.telemetry import traces
from chiasm.transport import handover, interceptors, loads
from chiasm.transport.accepted import accept
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc, inference_pb2

PROMPT_ROWS_BYTES = 1 << 30
"""Logits and log-probabilities of prompts that callers may not have read yet, all calls together; a
single one may have more."""

MAX_UNREAD = 256
"""Events of one call that may wait for its caller; it then stands still until they are read."""

Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class DecoderServicer(decoder_pb2_grpc.DecoderServicer):
    """`engine` is None until the weights are loaded."""

    def __init__(self, config: ModelConfig, embeddings: EmbeddingStore, grammars: Grammars) -> None:
        self.engine: Engine | None = None
        self._config, self._embeddings, self._grammars = config, embeddings, grammars
        self._calls: dict[str, asyncio.Task[object]] = {}
        self._aborted: set[str] = set()
        self._is_draining = False
        self._prompt_rows_bytes = self._num_fetching = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Decode(
        self, request: decoder_pb2.DecodeRequest, context: Context
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        engine = self._ready_engine()
        if self._is_draining:
            raise errors.Unavailable(
                "the decoder is draining", reason=errors.DRAINING, retry_after_s=1.0
            )
        wire.check(request, self._config)
        await handover.vacated(self._calls, request.request_id)
        if request.request_id in self._calls:
            raise errors.AlreadyExists(f"request {request.request_id!r} is in flight")
        num_bytes = wire.prompt_rows_bytes(request, self._config)
        self._calls[request.request_id] = handover.current_task()
        self._idle.clear()
        try:
            self._reserve(num_bytes)
            await accept(context)
            with traces.span("decode", kind=traces.SERVER) as span:
                span.set_attributes(
                    {
                        "gen_ai.request.id": request.request_id,
                        "gen_ai.usage.input_tokens": len(request.token_types),
                    }
                )
                # Closed here and now, not by the garbage collector: the id is free only afterwards.
                async with contextlib.aclosing(self._run(engine, request)) as events:
                    async for event in events:
                        yield event
        except asyncio.CancelledError:
            if request.request_id not in self._aborted:
                raise
            # grpc would say nothing to a peer whose call is cancelled from our side.
            raise errors.FailedPrecondition("the request was aborted", reason="ABORTED") from None
        finally:
            self._prompt_rows_bytes -= num_bytes
            self._aborted.discard(request.request_id)
            del self._calls[request.request_id]
            if not self._calls:
                self._idle.set()

    def _reserve(self, num_bytes: int) -> None:
        """Books a call's prompt rows, which are computed faster than they may be read."""
        used, self._prompt_rows_bytes = self._prompt_rows_bytes, self._prompt_rows_bytes + num_bytes
        if used and num_bytes and self._prompt_rows_bytes > PROMPT_ROWS_BYTES:
            raise errors.ResourceExhausted(
                f"{used} bytes of other prompts' logits have not been read", retry_after_s=1.0
            )

    async def Abort(
        self, request: decoder_pb2.AbortRequest, context: Context
    ) -> decoder_pb2.AbortResponse:
        task = self._calls.get(request.request_id)
        if task is not None:
            self._aborted.add(request.request_id)
            task.cancel()
        return decoder_pb2.AbortResponse()

    async def GetLoad(
        self, request: decoder_pb2.GetDecoderLoadRequest, context: Context
    ) -> decoder_pb2.DecoderLoad:
        return loads.decoder_to_proto(self._ready_engine().report())

    async def drain(self) -> None:
        """Refuses new calls and returns when none is running."""
        self._is_draining = True
        await self._idle.wait()

    def _ready_engine(self) -> Engine:
        if self.engine is None:
            raise errors.Unavailable("the decoder is loading", reason="LOADING", retry_after_s=1.0)
        return self.engine

    async def _run(
        self, engine: Engine, request: decoder_pb2.DecodeRequest
    ) -> AsyncGenerator[decoder_pb2.DecodeEvent, None]:
        start = time.monotonic_ns()
        embeddings = await self._fetch(engine, request.media) if request.media else []
        fetch_ns = time.monotonic_ns() - start if request.media else 0
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        sequence = self._sequence(request, embeddings, engine.load().kv_tokens_total)
        if sequence.finish_reason is not None:
            # All that was lost with another decoder is the word that it was the last token.
            yield wire.finished(sequence.finish_reason, wire.timings(sequence.timings, fetch_ns))
            return
        if request.grammar:
            sequence.matcher = await asyncio.to_thread(self._grammars.matcher, request.grammar)

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        sequence.sink = sink
        sequence.is_behind = lambda: events.qsize() >= MAX_UNREAD
        engine.submit(sequence)
        is_first = True
        try:
            while True:
                match await events.get():
                    case TokenEvent() as token:
                        message = wire.token(token)
                        if is_first:
                            spent = wire.timings(sequence.timings, fetch_ns)
                            message.tokens.timings.CopyFrom(spent)
                            message.tokens.cached_tokens = sequence.num_prompt_cached
                        yield message
                        is_first = False
                    case PromptLogprobsEvent() as logprobs:
                        yield wire.prompt_logprobs(logprobs)
                    case PromptLogitsEvent(offset=offset, rows=rows):
                        for message in wire.prompt_logits(offset, rows, sequence.num_prompt):
                            yield message
                    case FinishedEvent(reason=reason):
                        spent = wire.timings(sequence.timings, fetch_ns)
                        _log(sequence, reason, spent)
                        yield wire.finished(reason, spent)
                        return
                    case FailedEvent(error=error):
                        raise error
        finally:
            engine.abort(sequence)

    async def _fetch(
        self, engine: Engine, media: Iterable[decoder_pb2.MediaRef]
    ) -> list[torch.Tensor]:
        """The embeddings of a request's media, if it can be queued then: they take memory."""
        engine.check_room(self._num_fetching)
        self._num_fetching += 1
        try:
            return await asyncio.gather(
                *(self._embeddings.get(ref, interceptors.request_id()) for ref in media)
            )
        finally:
            self._num_fetching -= 1

    def _sequence(
        self, request: decoder_pb2.DecodeRequest, embeddings: list[torch.Tensor], capacity: int
    ) -> Sequence:
        positions, next_position = position_ids(
            len(request.token_types), wire.media(request), self._config
        )
        return Sequence(
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            prompt_types=request.token_types,
            positions=positions,
            next_position=next_position,
            media=tuple(
                MediaRows(ref.offset, ref.num_tokens, ref.digest, rows)
                for ref, rows in zip(request.media, embeddings, strict=True)
            ),
            sampling=wire.sampling(request, self._config, capacity=capacity),
            prompt_logits=request.prompt_logits,
            priority=request.priority,
            num_resumed=request.num_generated,
            trace_context=otel_context.get_current(),
        )


def _log(sequence: Sequence, reason: str, spent: inference_pb2.Timings) -> None:
    log.info(
        "decoded",
        reason=reason,
        prompt_tokens=sequence.num_prompt,
        cached_tokens=sequence.num_prompt_cached,
        completion_tokens=sequence.num_generated,
        fetch_ms=round(spent.fetch_ns / 1e6, 3),
        queue_ms=round(spent.queue_ns / 1e6, 3),
        prefill_ms=round(spent.prefill_ns / 1e6, 3),
        decode_ms=round(spent.decode_ns / 1e6, 3),
    )
