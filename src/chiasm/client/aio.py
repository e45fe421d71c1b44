"""The asyncio client; its methods mirror Client's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace

from chiasm.client import calls, codec, events
from chiasm.client.assembly import Assembler
from chiasm.client.messages import DEFAULT_SAMPLING, Prompt, Sampling
from chiasm.client.resumption import PAUSE_S, Resumption
from chiasm.transport import channel
from chiasm.types import TlsFiles
from chiasm.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """Speaks to a gateway at host:port. Calls raise chiasm.errors and are bounded in time.

    Use as an async context manager, or call `close`. With `tls`, which may be empty, the
    connection is encrypted; without, plain text. Belongs to the event loop it is made in. A stream
    that breaks off goes on at whichever gateway answers there within `resume_timeout_s`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout_s: float = calls.DEFAULT_TIMEOUT_S,
        tls: TlsFiles | None = None,
        api_key: str = "",
        resume_timeout_s: float = calls.RESUME_TIMEOUT_S,
    ) -> None:
        self._endpoint, self._timeout_s = endpoint, timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._credentials = calls.credentials(api_key)
        self._channel = channel.open_channel(
            endpoint, max_message_bytes=calls.MAX_MESSAGE_BYTES, files=tls
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._is_closed = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls and the connection; later calls raise FailedPrecondition."""
        self._is_closed = True
        await self._channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        enable_thinking: bool = False,
        prompt_token_ids: bool = False,
        prompt_logits: bool = False,
        priority: int = 0,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[events.Event]:
        """Streams the answer: Started, PromptLogits and PromptLogprobs if asked for, Deltas, a
        ChoiceFinished for each answer, Finished.

        Closing the iterator (`aclose`) or cancelling the task cancels the request.
        """
        options = codec.Options(
            sampling=sampling,
            enable_thinking=enable_thinking,
            prompt_token_ids=prompt_token_ids,
            prompt_logits=prompt_logits,
            priority=priority,
            model=model,
        )
        request_id = calls.new_request_id(request_id)
        calls.check_open(self._is_closed)
        request = codec.generate_request(prompt, options, request_id=request_id)
        span = calls.start_span(prompt, options)
        stream = Resumption(request, self._resume_timeout_s)
        end = time.monotonic() + calls.bound_s(timeout_s, self._timeout_s)
        with calls.ending(span), calls.rpc_errors(self._endpoint):
            with trace.use_span(span):
                metadata = calls.metadata(request_id, self._credentials)
            while True:
                left_s = max(0.0, end - time.monotonic())
                call = self._stub.Generate(stream.request, timeout=left_s, metadata=metadata)
                try:
                    async for answer in call:
                        event = codec.event(answer)
                        if event is not None and stream.is_new(event):
                            calls.record(span, event)
                            yield event
                    return
                except grpc.RpcError as failure:
                    if stream.is_finished:
                        return
                    if self._is_closed or not stream.is_worth(failure):
                        raise
                finally:
                    call.cancel()
                await asyncio.sleep(PAUSE_S)
                calls.check_open(self._is_closed)

    async def complete(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        enable_thinking: bool = False,
        prompt_token_ids: bool = True,
        prompt_logits: bool = False,
        priority: int = 0,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
    ) -> events.Result:
        """The whole answer at once."""
        assembler = Assembler()
        async for event in self.generate(
            prompt,
            sampling=sampling,
            enable_thinking=enable_thinking,
            prompt_token_ids=prompt_token_ids,
            prompt_logits=prompt_logits,
            priority=priority,
            request_id=request_id,
            model=model,
            timeout_s=timeout_s,
        ):
            assembler.add(event)
        return assembler.result()

    async def count_tokens(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool = False,
        model: str = "",
        timeout_s: float | None = None,
    ) -> events.Usage:
        """Prompt tokens by modality that `generate` would use."""
        request = codec.count_request(prompt, enable_thinking=enable_thinking, model=model)
        calls.check_open(self._is_closed)
        with calls.rpc_errors(self._endpoint):
            answer = await self._stub.CountTokens(
                request,
                timeout=calls.bound_s(timeout_s, self._timeout_s),
                metadata=calls.metadata(calls.new_request_id(""), self._credentials),
            )
        return codec.usage(answer.usage)

    async def get_model(self, *, timeout_s: float = calls.SHORT_TIMEOUT_S) -> events.Model:
        """The served model and the gateway's limits."""
        calls.check_open(self._is_closed)
        with calls.rpc_errors(self._endpoint):
            answer = await self._stub.GetModel(
                inference_pb2.GetModelRequest(), timeout=timeout_s, metadata=self._credentials
            )
        return codec.model(answer)

    async def wait_ready(self, timeout_s: float = calls.SHORT_TIMEOUT_S) -> None:
        """Returns once the gateway says SERVING.

        Raises Unavailable if that takes too long, Unauthenticated for a key that is not known.
        """
        calls.check_open(self._is_closed)
        health = health_pb2_grpc.HealthStub(self._channel)
        request = health_pb2.HealthCheckRequest(service=calls.SERVICE)
        polls = calls.Polls(timeout_s, self._endpoint)
        with calls.rpc_errors(self._endpoint):
            while True:
                try:
                    answer = await health.Check(
                        request, timeout=polls.left_s(), metadata=self._credentials
                    )
                except grpc.RpcError as error:
                    polls.failed(error)
                else:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(polls.pause_s())
