"""Inference over gRPC: decode, call, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import grpc
import structlog
from opentelemetry import context as otel_context

from chiasm import errors
from chiasm.services.gateway import admission
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.domain import PromptInput
from chiasm.services.gateway.engine import Engine
from chiasm.services.gateway.generation import usage_message
from chiasm.services.gateway.observation import Observation
from chiasm.services.gateway.validate import request_id
from chiasm.transport import handover, interceptors
from chiasm.v1 import inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Answers UNAVAILABLE until `engine` is set. Counts what is in flight, and refuses beyond."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self.engine: Engine | None = None
        self._calls: dict[str, asyncio.Task[object]] = {}
        self._media_bytes = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        deadline = self._deadline(context)
        operation = "text_completion" if request.WhichOneof("input") == "tokens" else "chat"
        with Observation(
            operation=operation, model=self._settings.served_name, deadline=deadline
        ) as observation:
            engine = self._loaded()
            request.request_id = request.request_id or self._id_of_metadata()
            generation = engine.validator.generation(request)
            structlog.contextvars.bind_contextvars(request_id=generation.request_id)
            observation.validated(generation)
            await handover.vacated(self._calls, generation.request_id)
            with self._slot(generation.request_id, generation.prompt):
                async with _bounded(deadline):
                    responses = engine.generator.run(generation, observation, deadline)
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            yield response

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        engine, deadline = self._loaded(), self._deadline(context)
        prompt = engine.validator.count(request)
        with self._slot(request_id(""), prompt):
            async with _bounded(deadline):
                laid_out = await engine.prompts.build(
                    prompt,
                    request_id=interceptors.request_id(),
                    deadline=deadline,
                    context=otel_context.get_current(),
                    must_fit=False,
                )
        return inference_pb2.CountTokensResponse(usage=usage_message(laid_out.usage))

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        config, settings = self._loaded().config, self._settings
        return inference_pb2.GetModelResponse(
            name=settings.served_name,
            max_context_tokens=config.text.max_position_embeddings,
            vocab_size=config.text.vocab_size,
            max_media_items=settings.max_media_items,
            max_media_bytes=settings.max_media_bytes,
            max_image_pixels=settings.max_image_pixels,
            dtype=settings.dtype,
            max_request_media_bytes=settings.max_request_media_bytes,
            max_text_bytes=settings.max_text_bytes,
            max_prompt_logits_bytes=settings.max_prompt_logits_bytes,
        )

    async def drain(self) -> None:
        """Refuses new calls and returns once nothing is in flight."""
        self._is_draining = True
        await self._idle.wait()

    def _loaded(self) -> Engine:
        if self.engine is None:
            raise errors.Unavailable(
                "the model is being loaded", retry_after_s=self._settings.retry_after_s
            )
        return self.engine

    def _deadline(self, context: Context) -> Deadline:
        remaining_s = context.time_remaining()
        return Deadline.after(
            self._settings.default_timeout_s if remaining_s is None else remaining_s
        )

    def _id_of_metadata(self) -> str:
        """The call's id in the log so far, for a request without one; empty if it is not free."""
        given = interceptors.request_id()
        return "" if given in self._calls else given

    @contextlib.contextmanager
    def _slot(self, call_id: str, prompt: PromptInput) -> Iterator[None]:
        """A place among the calls in flight for an id that no other one has, and for its media."""
        if self._is_draining:
            raise errors.Unavailable(
                "the gateway is shutting down",
                reason=errors.DRAINING,
                retry_after_s=self._settings.retry_after_s,
            )
        if call_id in self._calls:
            raise errors.AlreadyExists(
                f"request {call_id} is in flight", reason="REQUEST_IN_FLIGHT", field="request_id"
            )
        num_bytes = sum(source.num_bytes for source in prompt.media)
        self._check_room(num_bytes)
        self._calls[call_id] = handover.current_task()
        self._media_bytes += num_bytes
        self._idle.clear()
        try:
            yield
        finally:
            del self._calls[call_id]
            self._media_bytes -= num_bytes
            if not self._calls:
                self._idle.set()

    def _check_room(self, num_bytes: int) -> None:
        """Raises ResourceExhausted when there is none for a call with so many bytes of media."""
        held, limit = self._media_bytes, self._settings.max_held_media_bytes
        if len(self._calls) >= self._settings.max_in_flight:
            problem = f"{len(self._calls)} requests are in flight"
        elif held and num_bytes and held + num_bytes > limit:
            problem = f"{held} bytes of other requests' media are held, limit {limit}"
        else:
            return
        raise admission.full(problem, self._settings.retry_after_s)


@contextlib.asynccontextmanager
async def _bounded(deadline: Deadline) -> AsyncIterator[None]:
    """Cuts the block off at the deadline. Raises DeadlineExceeded then."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            yield
    except TimeoutError:
        raise errors.DeadlineExceeded("the request's deadline has passed") from None
