"""A laid-out prompt to tokens: which decoder takes it, and what to do when that one is away."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc
import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace

from chiasm import errors
from chiasm.membership import MemberInfo
from chiasm.services.gateway.channels import Channels
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.members import (
    BrokenOff,
    MemberSearch,
    Waiting,
    call_error,
    may_try_another,
)
from chiasm.telemetry import metrics, traces
from chiasm.transport import status
from chiasm.transport.membership import TopologyWatcher
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc

MAX_RESUMES = 3
"""Decoders one answer may outlive. A request that brings decoders down must not go through all."""

PROGRESS = 256
"""An answer that got so many tokens from a decoder may outlive as many as at its beginning."""

log = structlog.get_logger()


@dataclass(slots=True)
class Home:
    """Where the answers to one request are made: the decoder that knows their prompt.

    is_resumed: a gateway before this one has asked for them, and a decoder may still be at it.
    """

    is_resumed: bool
    address: str = ""


class Decoders:
    """The decoders as one. A request goes to the one that has fewest of this gateway's; further
    answers to it go where the first one went, and find the prompt in that decoder's cache."""

    def __init__(
        self,
        topology: TopologyWatcher,
        channels: Channels,
        *,
        park_timeout_s: float,
        retry_after_s: float,
    ) -> None:
        self._topology, self._channels = topology, channels
        self.waiting = Waiting()
        self._park_timeout_s, self._retry_after_s = park_timeout_s, retry_after_s
        self._in_flight: Counter[str] = Counter()

    async def decode(
        self,
        request: decoder_pb2.DecodeRequest,
        generated: list[int],
        home: Home,
        *,
        deadline: Deadline,
        context: otel_context.Context,
    ) -> AsyncGenerator[decoder_pb2.DecodeEvent, None]:
        """Streams the events of one generation; its spans are children of `context`.

        home: shared by the answers to one request.

        A decoder that fails is replaced by another one, which goes on where the answer broke off:
        `generated` holds the answer's tokens so far and gets those of this call. Sampling depends
        on the seed and the number of the token alone, so the answer is the one it would have been.
        Raises NotFound with reason EMBEDDING_EVICTED, Unavailable, DeadlineExceeded, or what the
        decoder refused with.
        """
        search, resumes_left = self._search(deadline), MAX_RESUMES
        was_accepted = home.is_resumed or bool(generated)
        while True:
            decoder = self._choose(await search.candidates(), home)
            num_before, has_output = len(generated), False
            attempt = _continued(request, generated)
            events = self._try(decoder, attempt, deadline=deadline, context=context)
            try:
                async for event in events:
                    has_output = True
                    generated.extend(event.tokens.token_ids)
                    yield event
                return
            except errors.ChiasmError as error:
                if was_accepted and isinstance(error, errors.AlreadyExists):
                    # By itself: that decoder has not noticed yet that the connection broke.
                    error = self._lost(error)
                if not may_try_another(error):
                    raise
                was_accepted |= has_output or isinstance(error, BrokenOff)
                has_gone_on = len(generated) > num_before
                if len(generated) - num_before >= PROGRESS:
                    resumes_left = MAX_RESUMES
                if has_output and not generated:
                    raise self._final(error) from None  # what concerns the prompt is sent once
                if has_gone_on or isinstance(error, BrokenOff):
                    if not resumes_left:
                        raise self._final(error) from None
                    resumes_left -= 1
                log.warning(
                    "decoder_away",
                    decoder=decoder.address,
                    generated=len(generated),
                    error=error.message[:256],
                )
                if has_gone_on:
                    search = self._search(deadline)
                    metrics.RESUMES.inc()
                search.failed(decoder, error)
            finally:
                await events.aclose()

    def _search(self, deadline: Deadline) -> MemberSearch:
        return MemberSearch(
            self._topology,
            lambda topology: topology.decoders(),
            unavailable=errors.Unavailable(
                "no decoder is available",
                reason="DECODER_UNAVAILABLE",
                retry_after_s=self._retry_after_s,
            ),
            park_timeout_s=self._park_timeout_s,
            deadline=deadline,
            waiting=self.waiting,
        )

    def _choose(self, decoders: list[MemberInfo], home: Home) -> MemberInfo:
        """The request's home if it can be had, else the least busy one, its home from now on."""
        known = [decoder for decoder in decoders if decoder.address == home.address]
        chosen = min(known or decoders, key=lambda decoder: self._in_flight[decoder.address])
        home.address = chosen.address
        return chosen

    def _final(self, error: errors.ChiasmError) -> errors.ChiasmError:
        """How an answer ends that no other decoder goes on with: as its own says, if it does."""
        if error.reason == errors.Unavailable.default_reason:
            return self._lost(error)
        error.retry_after_s = error.retry_after_s or self._retry_after_s
        return error

    def _lost(self, error: errors.ChiasmError) -> errors.Unavailable:
        return errors.Unavailable(
            f"the decoder was lost while it answered: {error.message}",
            reason="DECODER_LOST",
            retry_after_s=self._retry_after_s,
        )

    async def _try(
        self,
        decoder: MemberInfo,
        request: decoder_pb2.DecodeRequest,
        *,
        deadline: Deadline,
        context: otel_context.Context,
    ) -> AsyncGenerator[decoder_pb2.DecodeEvent, None]:
        timeout_s = deadline.remaining_s()
        span = traces.tracer.start_span(
            "decode",
            context=context,
            kind=traces.CLIENT,
            attributes=traces.peer(decoder.address),
        )
        with trace.use_span(span):
            # Further answers to one request go by its id and a number.
            metadata = traces.metadata(request.request_id.partition(" ")[0])
        stub = decoder_pb2_grpc.DecoderStub(self._channels.get(decoder.address))
        call = stub.Decode(request, timeout=timeout_s, metadata=metadata)
        self._in_flight[decoder.address] += 1
        is_finished = False
        try:
            async for message in call:
                event = status.parsed(message, decoder.address)
                is_finished = event.HasField("finished")
                yield event
        except grpc.RpcError as failure:
            if is_finished:
                return  # all has been said
            error = await call_error(call, failure)
            traces.mark_failed(span, error)
            raise error from None
        finally:
            call.cancel()
            span.end()
            self._in_flight[decoder.address] -= 1
            if not self._in_flight[decoder.address]:
                del self._in_flight[decoder.address]


def _continued(
    request: decoder_pb2.DecodeRequest, generated: list[int]
) -> decoder_pb2.DecodeRequest:
    """The request, with the tokens of its answer that the client has already."""
    if not generated:
        return request
    continued = decoder_pb2.DecodeRequest()
    continued.CopyFrom(request)
    continued.token_ids.extend(generated)
    continued.num_generated = len(generated)
    # What concerns the prompt was sent before the first token.
    continued.prompt_logits = False
    continued.sampling.ClearField("prompt_logprobs")
    return continued
