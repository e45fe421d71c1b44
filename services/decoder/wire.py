"""DecodeRequest to a Sequence, every bound checked, and events back to messages."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator

import torch

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.layout import LaidOutMedia
from chiasm.services.decoder.grammars import MAX_GRAMMAR_BYTES
from chiasm.services.decoder.sequence import (
    FinishReason,
    PromptLogprobsEvent,
    Sampling,
    SequenceTimings,
    TokenEvent,
)
from chiasm.transport import tensors
from chiasm.transport.enums import MEDIA_KINDS
from chiasm.types import TOKEN_VIDEO, Grid, Modality
from chiasm.v1 import decoder_pb2, inference_pb2, tensor_pb2

LOGITS_CHUNK_BYTES = 1 << 20

_LISTED_BYTES = 128
"""Of a token and its log-probability in a list; about."""

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def check(request: decoder_pb2.DecodeRequest, config: ModelConfig) -> None:
    """Raises InvalidArgument with the field named."""
    num_tokens, limit = len(request.token_ids), config.text.max_position_embeddings
    num_prompt = num_tokens - request.num_generated
    if not 1 <= num_prompt < limit or num_tokens > limit:
        raise errors.InvalidArgument(
            "token_ids",
            f"a prompt of 1 to {limit - 1} tokens and an answer that fit {limit}, "
            f"got {num_prompt} + {request.num_generated}",
        )
    if len(request.token_types) != num_prompt or max(request.token_types) > TOKEN_VIDEO:
        raise errors.InvalidArgument("token_types", "one byte of 0, 1 or 2 per prompt token")
    if len(request.grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise errors.InvalidArgument("grammar", f"is larger than {MAX_GRAMMAR_BYTES} bytes")
    _check_media(request, num_prompt)
    _check_ids(request, config.text.vocab_size)
    _check_sampling(request, num_prompt, limit)


def _check_media(request: decoder_pb2.DecodeRequest, num_prompt: int) -> None:
    end = 0
    for i, ref in enumerate(request.media):
        if ref.kind not in MEDIA_KINDS:
            raise errors.InvalidArgument(f"media[{i}].kind", "image or video")
        if ref.offset < end or ref.offset + ref.num_tokens > num_prompt or not ref.num_tokens:
            raise errors.InvalidArgument(
                f"media[{i}].offset", "items must lie in order, in the prompt"
            )
        end = ref.offset + ref.num_tokens


def _check_ids(request: decoder_pb2.DecodeRequest, vocab_size: int) -> None:
    """An id without a row would end the step, and with it every request in it."""
    lists: dict[str, Iterable[int]] = {
        "token_ids": request.token_ids,
        "think_end_ids": request.think_end_ids,
        "sampling.stop_token_ids": request.sampling.stop_token_ids,
        "sampling.logit_bias": request.sampling.logit_bias,
    }
    for field, ids in lists.items():
        if max(ids, default=0) >= vocab_size:
            raise errors.InvalidArgument(field, f"ids must lie below {vocab_size}")


def _check_sampling(request: decoder_pb2.DecodeRequest, num_prompt: int, limit: int) -> None:
    wire = request.sampling
    if wire.max_tokens > limit - num_prompt:
        raise errors.InvalidArgument(
            "sampling.max_tokens",
            f"{num_prompt} prompt + {wire.max_tokens} new tokens exceed {limit}",
        )
    # In these forms NaN is refused as well.
    if not 0 <= wire.temperature < math.inf:
        raise errors.InvalidArgument("sampling.temperature", "must be finite and at least 0")
    if wire.HasField("repetition_penalty") and not 0 < wire.repetition_penalty < math.inf:
        raise errors.InvalidArgument("sampling.repetition_penalty", "must be finite and above 0")
    if wire.HasField("top_p") and not 0 < wire.top_p <= 1:
        raise errors.InvalidArgument("sampling.top_p", "must be above 0 and at most 1")
    if not 0 <= wire.min_p <= 1:
        raise errors.InvalidArgument("sampling.min_p", "must lie between 0 and 1")


def prompt_rows_bytes(request: decoder_pb2.DecodeRequest, config: ModelConfig) -> int:
    """What the logits and log-probabilities of the prompt take, as far as they are wanted."""
    num_prompt, sampling = len(request.token_types), request.sampling
    num_bytes = num_prompt * config.text.vocab_size * 4 if request.prompt_logits else 0
    if sampling.HasField("prompt_logprobs"):
        num_bytes += num_prompt * (1 + sampling.prompt_logprobs) * _LISTED_BYTES
    return num_bytes


def media(request: decoder_pb2.DecodeRequest) -> tuple[LaidOutMedia, ...]:
    """The items' places and extents."""
    return tuple(
        LaidOutMedia(
            kind=MEDIA_KINDS[ref.kind],
            grid=Grid(ref.grid.t, ref.grid.h, ref.grid.w),
            offset=ref.offset,
            num_tokens=ref.num_tokens,
            index=i,
        )
        for i, ref in enumerate(request.media)
    )


def sampling(request: decoder_pb2.DecodeRequest, config: ModelConfig, *, capacity: int) -> Sampling:
    """Sampling parameters with every default filled in. capacity: tokens of the KV cache."""
    wire = request.sampling
    num_prompt = len(request.token_ids) - request.num_generated
    room = min(config.text.max_position_embeddings, capacity) - num_prompt
    eos = () if wire.ignore_eos else config.tokens.eos
    return Sampling(
        max_tokens=wire.max_tokens or max(1, room),
        temperature=wire.temperature if wire.HasField("temperature") else 1.0,
        top_p=wire.top_p if wire.HasField("top_p") else 1.0,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        seed=wire.seed if wire.HasField("seed") else secrets.randbits(64),
        stop_token_ids=frozenset((*wire.stop_token_ids, *eos)),
        min_tokens=wire.min_tokens,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        prompt_logprobs=wire.prompt_logprobs if wire.HasField("prompt_logprobs") else None,
        think_end_ids=tuple(request.think_end_ids),
        thinking_budget=wire.thinking_budget if wire.HasField("thinking_budget") else None,
    )


def token(event: TokenEvent) -> decoder_pb2.DecodeEvent:
    """A token, with its log-probabilities where they are wanted."""
    logprobs = [] if event.logprob is None else [_ranked(event.token_id, event.logprob, event.top)]
    return decoder_pb2.DecodeEvent(
        tokens=decoder_pb2.DecodedTokens(token_ids=[event.token_id], logprobs=logprobs)
    )


def prompt_logprobs(event: PromptLogprobsEvent) -> decoder_pb2.DecodeEvent:
    return decoder_pb2.DecodeEvent(
        prompt_logprobs=inference_pb2.PromptLogprobs(
            offset=event.offset, tokens=[_ranked(*token) for token in event.tokens]
        )
    )


def _ranked(
    token_id: int, logprob: float, top: Iterable[tuple[int, float]]
) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        token=inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob),
        top=[inference_pb2.TokenLogprob(token_id=i, logprob=value) for i, value in top],
    )


def prompt_logits(
    offset: int, rows: torch.Tensor, total_rows: int
) -> Iterator[decoder_pb2.DecodeEvent]:
    """Rows float32 [N, V] in messages of bounded size."""
    step = max(1, LOGITS_CHUNK_BYTES // (rows.shape[1] * rows.element_size()))
    for start in range(0, rows.shape[0], step):
        chunk = tensor_pb2.TensorChunk(
            row_offset=offset + start,
            total_rows=total_rows,
            rows=tensors.to_wire(rows[start : start + step]),
        )
        yield decoder_pb2.DecodeEvent(prompt_logits=chunk)


def timings(times: SequenceTimings, fetch_ns: int) -> inference_pb2.Timings:
    """The decoder's part of the timings, as far as it has come."""
    return inference_pb2.Timings(
        fetch_ns=fetch_ns,
        queue_ns=times.admitted - times.submitted,
        prefill_ns=times.first_token - times.admitted,
        decode_ns=max(0, times.finished - times.first_token),
        text_expert_wait_ns=times.expert_wait[Modality.TEXT],
        vision_expert_wait_ns=times.expert_wait[Modality.VISION],
    )


def finished(reason: FinishReason, spent: inference_pb2.Timings) -> decoder_pb2.DecodeEvent:
    return decoder_pb2.DecodeEvent(
        finished=decoder_pb2.DecodeFinished(reason=_REASONS[reason], timings=spent)
    )
