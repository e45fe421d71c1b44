"""One generation from the validated request to the finished event."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import structlog

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.gateway import grammars, thinking
from chiasm.services.gateway.answer import Answer
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.decoders import Decoders, Home
from chiasm.services.gateway.domain import Generation, Usage
from chiasm.services.gateway.merging import merged
from chiasm.services.gateway.observation import Observation
from chiasm.services.gateway.prompts import LaidOut, PromptBuilder
from chiasm.services.gateway.requests import decode_request
from chiasm.v1 import decoder_pb2, inference_pb2

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]
Events = AsyncGenerator[decoder_pb2.DecodeEvent, None]
Ending = Sequence[inference_pb2.GenerateResponse]

_MAX_ENCODE_AGAIN = 2
_LOGIT_BYTES = 4
_REPLAYED_AT_A_TIME = 2048
_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What all answers to one request have in common.

    seed: of the first answer. thought_end: the token that ends the thought in which the prompt
    breaks off, if it does. home: the decoder of all of them, once one has been chosen.
    """

    generation: Generation
    laid_out: LaidOut
    observation: Observation
    deadline: Deadline
    seed: int
    thought_end: int | None
    home: Home


class Generator:
    """Runs generations for one model.

    num_plain_answers, num_media_answers: answers asked for since the start, by requests without and
    with media; counted before the media are encoded.
    """

    def __init__(
        self,
        *,
        model_name: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        prompts: PromptBuilder,
        decoders: Decoders,
        max_prompt_logits_bytes: int,
        retry_after_s: float,
    ) -> None:
        self._model_name, self._config, self._tokenizer = model_name, config, tokenizer
        self._prompts, self._decoders = prompts, decoders
        self._max_prompt_logits_bytes = max_prompt_logits_bytes
        self._retry_after_s = retry_after_s
        self.num_plain_answers = self.num_media_answers = 0

    async def run(
        self, generation: Generation, observation: Observation, deadline: Deadline
    ) -> Responses:
        """Streams the answers. Raises chiasm.errors."""
        grammar, seed = generation.sampling.grammar, generation.sampling.seed
        if grammar is not None:
            await asyncio.to_thread(grammars.check, grammar)
        if generation.prompt.media:
            self.num_media_answers += generation.sampling.num_choices
        else:
            self.num_plain_answers += generation.sampling.num_choices
        laid_out = await self._prompts.build(
            generation.prompt,
            request_id=generation.request_id,
            deadline=deadline,
            context=observation.context,
            must_fit=True,
        )
        if laid_out.items:
            observation.encoded(laid_out.encode_ns)
        self._check_fit(generation, laid_out)
        observation.laid_out(laid_out.usage)
        token_ids = laid_out.prompt.token_ids
        call = _Call(
            generation=generation,
            laid_out=laid_out,
            observation=observation,
            deadline=deadline,
            seed=secrets.randbits(64) if seed is None else seed,
            thought_end=thinking.thought_end(token_ids, self._tokenizer),
            home=Home(is_resumed=generation.is_resumed),
        )
        answers = [self._new_answer(call, i) for i in range(generation.sampling.num_choices)]
        ends = [await _replayed(answer, generation.received[answer.index]) for answer in answers]
        yield inference_pb2.GenerateResponse(
            started=inference_pb2.Started(
                request_id=generation.request_id,
                model=self._model_name,
                prompt_token_ids=token_ids if generation.prompt_token_ids else (),
                seed=call.seed,
            )
        )
        responses = merged(
            [self._stream(call, answer, end) for answer, end in zip(answers, ends, strict=True)],
            lambda response: response.HasField("delta"),
        )
        try:
            async for response in responses:
                yield response
        finally:
            await responses.aclose()
        yield _finished(call, answers)

    def _new_answer(self, call: _Call, index: int) -> Answer:
        return Answer(
            index=index,
            sampling=call.generation.sampling,
            tokenizer=self._tokenizer,
            thought_end=call.thought_end,
        )

    async def _stream(self, call: _Call, answer: Answer, end: Ending) -> Responses:
        """One answer; a decoder that does not know that it is complete is told so.

        end: what is left to say of an answer whose tokens the client has all.
        """
        for response in end:
            yield response
        if answer.reason is not None:
            return
        index = answer.index
        events = self._decode(call, index)
        try:
            async for event in events:
                num_before = answer.num_tokens
                responses = answer.responses(event)
                if answer.num_tokens > num_before:
                    call.observation.generated(index, answer.num_tokens - num_before)
                for response in responses:
                    yield response
                if answer.reason is not None and not event.HasField("finished"):
                    return
        finally:
            await events.aclose()
        if answer.reason is None:
            raise errors.Internal("the decoder ended the stream without a finished event")

    def _check_fit(self, generation: Generation, laid_out: LaidOut) -> None:
        num_tokens, max_tokens = laid_out.usage.prompt_tokens, generation.sampling.max_tokens
        limit = self._config.text.max_position_embeddings
        if num_tokens >= limit:
            raise errors.InvalidArgument(
                generation.prompt.field,
                f"the prompt has {num_tokens} tokens and leaves no room in the context of {limit}",
            )
        if num_tokens + max_tokens > limit:
            raise errors.InvalidArgument(
                "sampling.max_tokens",
                f"{num_tokens} prompt tokens and {max_tokens} to generate exceed the context of "
                f"{limit}",
            )
        for i, token_ids in enumerate(generation.received):
            if num_tokens + len(token_ids) > limit:
                raise errors.InvalidArgument(
                    f"received[{i}].token_ids",
                    f"{num_tokens} prompt tokens and {len(token_ids)} ids exceed the context of "
                    f"{limit}",
                )
        num_bytes = num_tokens * self._config.text.vocab_size * _LOGIT_BYTES
        if generation.prompt_logits and num_bytes > self._max_prompt_logits_bytes:
            raise errors.InvalidArgument(
                "output.prompt_logits",
                f"logits of {num_tokens} positions take {num_bytes} bytes, "
                f"limit {self._max_prompt_logits_bytes}",
            )

    async def _decode(self, call: _Call, index: int) -> Events:
        """The decoder's events; media whose embeddings were evicted meanwhile are encoded again."""
        laid_out, observation, deadline = call.laid_out, call.observation, call.deadline
        encoded = laid_out.encoded
        generated = [*call.generation.received[index]]
        for encodes_left in range(_MAX_ENCODE_AGAIN, -1, -1):
            request = decode_request(
                call.generation,
                laid_out,
                encoded,
                index=index,
                seed=call.seed,
                thought_end=call.thought_end,
            )
            events = self._decoders.decode(
                request,
                generated,
                call.home,
                deadline=deadline,
                context=observation.context,
            )
            try:
                async for event in events:
                    yield event
                return
            except errors.NotFound as error:
                if error.reason != errors.EMBEDDING_EVICTED or not encodes_left:
                    raise self._gone(error) from None
                log.warning("embedding_evicted", error=error.message[:256])
            finally:
                await events.aclose()
            encoded = await self._prompts.encode(
                laid_out.items,
                request_id=call.generation.request_id,
                deadline=deadline,
                context=observation.context,
            )

    def _gone(self, error: errors.NotFound) -> errors.ChiasmError:
        if error.reason != errors.EMBEDDING_EVICTED:
            return errors.Internal(f"the decoder misses something: {error.message}")
        return errors.Unavailable(
            "the embeddings of the media do not stay in the encoder's cache",
            reason=errors.EMBEDDING_EVICTED,
            retry_after_s=self._retry_after_s,
        )


async def _replayed(answer: Answer, received: Sequence[int]) -> Ending:
    """Goes through what the client has already; what is left to say of an answer it has whole.

    A slice at a time: others want the thread too, and the client may leave.
    """
    end: list[inference_pb2.GenerateResponse] = []
    for start in range(0, len(received), _REPLAYED_AT_A_TIME):
        token_ids = received[start : start + _REPLAYED_AT_A_TIME]
        end += await asyncio.to_thread(answer.replay, token_ids)
    return end


def _finished(call: _Call, answers: Sequence[Answer]) -> inference_pb2.GenerateResponse:
    """The last event; records that the call ended well."""
    num_tokens = sum(answer.num_tokens for answer in answers)
    first, laid_out = answers[0], call.laid_out
    assert first.reason is not None  # its stream would have ended in an error
    call.observation.finished(_REASONS[first.reason], num_tokens, num_cached=first.num_cached)
    timings = inference_pb2.Timings()
    timings.CopyFrom(first.timings)
    timings.layout_ns = laid_out.layout_ns
    timings.encode_ns = laid_out.encode_ns
    timings.total_ns = call.observation.elapsed_ns()
    return inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(
            reason=first.reason,
            usage=usage_message(
                laid_out.usage, completion_tokens=num_tokens, cached_tokens=first.num_cached
            ),
            timings=timings,
        )
    )


def usage_message(
    usage: Usage, *, completion_tokens: int = 0, cached_tokens: int = 0
) -> inference_pb2.Usage:
    """Token counts as the client gets them."""
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        prompt_text_tokens=usage.text,
        prompt_image_tokens=usage.image,
        prompt_video_tokens=usage.video,
        completion_tokens=completion_tokens,
        cached_tokens=cached_tokens,
    )
