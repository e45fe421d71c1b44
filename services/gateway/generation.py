"""One generation from the validated request to the finished event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import structlog

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import IncrementalDecoder, Tokenizer
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.decoders import EVICTED, Decoders
from chiasm.services.gateway.domain import Encoded, Generation, Usage
from chiasm.services.gateway.observation import Observation
from chiasm.services.gateway.prompts import LaidOut, PromptBuilder
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, decoder_pb2, inference_pb2

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]
Events = AsyncGenerator[decoder_pb2.DecodeEvent, None]

_MAX_ENCODE_AGAIN = 2
_LOGIT_BYTES = 4
_WIRE_KINDS = {
    MediaKind.IMAGE: common_pb2.MEDIA_KIND_IMAGE,
    MediaKind.VIDEO: common_pb2.MEDIA_KIND_VIDEO,
}
_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
log = structlog.get_logger()


class Generator:
    """Runs generations for one model."""

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

    async def run(
        self, generation: Generation, observation: Observation, deadline: Deadline
    ) -> Responses:
        """Streams the answer. Raises chiasm.errors."""
        laid_out = await self._prompts.build(
            generation.prompt,
            request_id=generation.request_id,
            deadline=deadline,
            context=observation.context,
        )
        if laid_out.items:
            observation.encoded(laid_out.encode_ns)
        self._check_fit(generation, laid_out)
        observation.laid_out(laid_out.usage)
        yield inference_pb2.GenerateResponse(
            started=inference_pb2.Started(
                request_id=generation.request_id,
                model=self._model_name,
                prompt_token_ids=laid_out.prompt.token_ids if generation.prompt_token_ids else (),
            )
        )
        answer = _Answer(generation, laid_out, observation, self._tokenizer)
        events = self._decode(generation, laid_out, observation, deadline)
        try:
            async for event in events:
                for response in answer.responses(event):
                    yield response
        finally:
            await events.aclose()
        if not answer.is_finished:
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
        num_bytes = num_tokens * self._config.text.vocab_size * _LOGIT_BYTES
        if generation.prompt_logits and num_bytes > self._max_prompt_logits_bytes:
            raise errors.InvalidArgument(
                "output.prompt_logits",
                f"logits of {num_tokens} positions take {num_bytes} bytes, "
                f"limit {self._max_prompt_logits_bytes}",
            )

    async def _decode(
        self,
        generation: Generation,
        laid_out: LaidOut,
        observation: Observation,
        deadline: Deadline,
    ) -> Events:
        """The decoder's events; media whose embeddings were evicted meanwhile are encoded again."""
        encoded = laid_out.encoded
        for encodes_left in range(_MAX_ENCODE_AGAIN, -1, -1):
            request = self._request(generation, laid_out, encoded)
            events = self._decoders.decode(request, deadline=deadline, context=observation.context)
            try:
                async for event in events:
                    yield event
                return
            except errors.NotFound as error:
                if error.reason != EVICTED or not encodes_left:
                    raise self._gone(error) from None
                log.warning("embedding_evicted", error=error.message[:256])
            finally:
                await events.aclose()
            encoded = await self._prompts.encode(
                laid_out.items,
                request_id=generation.request_id,
                deadline=deadline,
                context=observation.context,
            )

    def _gone(self, error: errors.NotFound) -> errors.ChiasmError:
        if error.reason != EVICTED:
            return errors.Internal(f"the decoder misses something: {error.message}")
        return errors.Unavailable(
            "the embeddings of the media do not stay in the encoder's cache",
            reason=EVICTED,
            retry_after_s=self._retry_after_s,
        )

    def _request(
        self, generation: Generation, laid_out: LaidOut, encoded: tuple[Encoded, ...]
    ) -> decoder_pb2.DecodeRequest:
        sampling = generation.sampling
        room = self._config.text.max_position_embeddings - laid_out.usage.prompt_tokens
        return decoder_pb2.DecodeRequest(
            request_id=generation.request_id,
            token_ids=laid_out.prompt.token_ids,
            token_types=laid_out.prompt.token_types,
            media=[
                decoder_pb2.MediaRef(
                    digest=encoded[item.index].digest,
                    kind=_WIRE_KINDS[item.kind],
                    grid=common_pb2.GridThw(t=item.grid.t, h=item.grid.h, w=item.grid.w),
                    offset=item.offset,
                    num_tokens=item.num_tokens,
                    encoder_address=encoded[item.index].encoder_address,
                )
                for item in laid_out.prompt.media
            ],
            sampling=inference_pb2.SamplingParams(
                max_tokens=sampling.max_tokens or room,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop_token_ids=sampling.stop_token_ids,
                ignore_eos=sampling.ignore_eos,
            ),
            prompt_logits=generation.prompt_logits,
        )


class _Answer:
    """Turns a decoder's events into the client's; owns the text and the counts."""

    def __init__(
        self,
        generation: Generation,
        laid_out: LaidOut,
        observation: Observation,
        tokenizer: Tokenizer,
    ) -> None:
        self._laid_out, self._observation = laid_out, observation
        self._text = IncrementalDecoder(tokenizer)
        self._silent = frozenset(generation.sampling.stop_token_ids)
        self._num_tokens = 0
        self.is_finished = False

    def responses(self, event: decoder_pb2.DecodeEvent) -> list[inference_pb2.GenerateResponse]:
        """What the client hears of an event."""
        match event.WhichOneof("event"):
            case "tokens":
                return [self._delta(event.tokens.token_ids)]
            case "prompt_logits":
                return [inference_pb2.GenerateResponse(prompt_logits=event.prompt_logits)]
            case "finished":
                return self._finish(event.finished)
        return []

    def _delta(self, token_ids: Sequence[int]) -> inference_pb2.GenerateResponse:
        """Stop tokens of the request count and are listed, but are no text, as in vLLM."""
        self._num_tokens += len(token_ids)
        self._observation.generated(len(token_ids))
        text = self._text.push(i for i in token_ids if i not in self._silent)
        return inference_pb2.GenerateResponse(
            delta=inference_pb2.Delta(text=text, token_ids=token_ids)
        )

    def _finish(self, finished: decoder_pb2.DecodeFinished) -> list[inference_pb2.GenerateResponse]:
        if finished.reason not in _REASONS:
            raise errors.Internal(f"the decoder sent finish reason {finished.reason}")
        self.is_finished = True
        self._observation.finished(_REASONS[finished.reason], self._num_tokens)
        usage = self._laid_out.usage
        timings = inference_pb2.Timings()
        timings.CopyFrom(finished.timings)
        timings.layout_ns = self._laid_out.layout_ns
        timings.encode_ns = self._laid_out.encode_ns
        timings.total_ns = self._observation.elapsed_ns()
        last = inference_pb2.GenerateResponse(
            finished=inference_pb2.Finished(
                reason=finished.reason,
                usage=usage_message(usage, completion_tokens=self._num_tokens),
                timings=timings,
            )
        )
        rest = self._text.flush()
        if not rest:
            return [last]
        return [inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=rest)), last]


def usage_message(usage: Usage, *, completion_tokens: int) -> inference_pb2.Usage:
    """Token counts as the client gets them."""
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        prompt_text_tokens=usage.text,
        prompt_image_tokens=usage.image,
        prompt_video_tokens=usage.video,
        completion_tokens=completion_tokens,
    )
