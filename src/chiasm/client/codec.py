"""Client values to messages and back: the only place of the client that knows both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from chiasm import errors
from chiasm.client import events
from chiasm.client.messages import (
    DEFAULT_SAMPLING,
    JsonObject,
    JsonSchema,
    Media,
    Message,
    OneOf,
    Prompt,
    Regex,
    ResponseFormat,
    Sampling,
    Text,
    Tokens,
)
from chiasm.types import MediaKind
from chiasm.v1 import inference_pb2, tensor_pb2

T = TypeVar("T", events.Usage, events.Timings, events.Model)

_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1
_REASONS: dict[int, events.FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything of a request that is not its prompt. priority: the lowest is served first."""

    sampling: Sampling = DEFAULT_SAMPLING
    enable_thinking: bool = False
    prompt_token_ids: bool = False
    prompt_logits: bool = False
    priority: int = 0
    model: str = ""


def generate_request(
    prompt: Prompt, options: Options, *, request_id: str
) -> inference_pb2.GenerateRequest:
    """Raises InvalidArgument for what no message can carry; the gateway judges the rest."""
    return inference_pb2.GenerateRequest(
        request_id=_utf8("request_id", request_id),
        model=_utf8("model", options.model),
        chat=_chat(prompt, options.enable_thinking),
        tokens=_tokens(prompt),
        sampling=_sampling(options.sampling),
        output=inference_pb2.OutputOptions(
            prompt_token_ids=options.prompt_token_ids, prompt_logits=options.prompt_logits
        ),
        priority=_integer("priority", options.priority, _INT32_MAX, minimum=-_INT32_MAX),
    )


def count_request(
    prompt: Prompt, *, enable_thinking: bool, model: str
) -> inference_pb2.CountTokensRequest:
    """Raises InvalidArgument as `generate_request` does."""
    return inference_pb2.CountTokensRequest(
        model=_utf8("model", model),
        chat=_chat(prompt, enable_thinking),
        tokens=_tokens(prompt),
    )


def _chat(prompt: Prompt, enable_thinking: bool) -> inference_pb2.Chat | None:
    if isinstance(prompt, Tokens):
        return None
    if isinstance(prompt, str):
        prompt = [Message(role="user", parts=(Text(prompt),))]
    return inference_pb2.Chat(
        messages=[_message(i, message) for i, message in enumerate(prompt)],
        enable_thinking=enable_thinking,
    )


def _message(index: int, message: Message) -> inference_pb2.Message:
    path = f"chat.messages[{index}]"
    parts = []
    for i, part in enumerate(message.parts):
        if isinstance(part, Text):
            text = _utf8(f"{path}.parts[{i}].text", part.text)
            parts.append(inference_pb2.Part(text=text))
        elif part.kind is MediaKind.IMAGE:
            parts.append(inference_pb2.Part(image=_media(part)))
        else:
            parts.append(inference_pb2.Part(video=_media(part)))
    return inference_pb2.Message(role=_utf8(f"{path}.role", message.role), parts=parts)


def _tokens(prompt: Prompt) -> inference_pb2.TokenPrompt | None:
    if not isinstance(prompt, Tokens):
        return None
    return inference_pb2.TokenPrompt(
        token_ids=_integers("tokens.token_ids", prompt.token_ids),
        images=map(_media, prompt.images),
        videos=map(_media, prompt.videos),
    )


def _media(media: Media) -> inference_pb2.Media:
    if media.uri:
        return inference_pb2.Media(uri=_utf8("uri", media.uri))
    return inference_pb2.Media(data=media.data)


def _sampling(sampling: Sampling) -> inference_pb2.SamplingParams:
    biases = {
        _integer("sampling.logit_bias", token_id): bias
        for token_id, bias in sampling.logit_bias.items()
    }
    return inference_pb2.SamplingParams(
        max_tokens=_integer("sampling.max_tokens", sampling.max_tokens),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=_integer("sampling.top_k", sampling.top_k),
        seed=_optional("sampling.seed", sampling.seed, _UINT64_MAX),
        stop_token_ids=_integers("sampling.stop_token_ids", sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=biases,
        stop=_texts("sampling.stop", sampling.stop),
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        min_tokens=_integer("sampling.min_tokens", sampling.min_tokens),
        logprobs=_optional("sampling.logprobs", sampling.logprobs),
        prompt_logprobs=_optional("sampling.prompt_logprobs", sampling.prompt_logprobs),
        n=_integer("sampling.n", sampling.n),
        thinking_budget=_optional("sampling.thinking_budget", sampling.thinking_budget),
        response_format=_response_format(sampling.response_format),
    )


def _response_format(form: ResponseFormat | None) -> inference_pb2.ResponseFormat | None:
    path = "sampling.response_format"
    match form:
        case JsonSchema(schema=schema):
            text = schema if isinstance(schema, str) else json.dumps(dict(schema))
            return inference_pb2.ResponseFormat(json_schema=_utf8(f"{path}.json_schema", text))
        case JsonObject():
            return inference_pb2.ResponseFormat(json_object=True)
        case Regex(pattern=pattern):
            return inference_pb2.ResponseFormat(regex=_utf8(f"{path}.regex", pattern))
        case OneOf(texts=texts):
            valid = _texts(f"{path}.choice.texts", texts)
            return inference_pb2.ResponseFormat(choice=inference_pb2.Choices(texts=valid))
    return None


def _texts(field: str, values: str | Sequence[str]) -> list[str]:
    """Texts, or a single one, which is no sequence of characters."""
    texts = [values] if isinstance(values, str) else values
    return [_utf8(f"{field}[{i}]", text) for i, text in enumerate(texts)]


def _utf8(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise errors.InvalidArgument(field, "the text is not valid UTF-8") from None
    return value


def _integers(field: str, values: Sequence[int]) -> list[int]:
    return [_integer(f"{field}[{i}]", value) for i, value in enumerate(values)]


def _optional(field: str, value: int | None, maximum: int = _UINT32_MAX) -> int | None:
    return None if value is None else _integer(field, value, maximum)


def _integer(field: str, value: int, maximum: int = _UINT32_MAX, *, minimum: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise errors.InvalidArgument(
            field, f"must be an integer in {minimum}..{maximum}, not {value!r}"
        )
    return value


def event(answer: inference_pb2.GenerateResponse) -> events.Event | None:
    """The event of a message; None for one this client does not know."""
    name = answer.WhichOneof("event")
    return _EVENTS[name](getattr(answer, name)) if name in _EVENTS else None


def _started(started: inference_pb2.Started) -> events.Started:
    return events.Started(
        request_id=started.request_id,
        model=started.model,
        prompt_token_ids=tuple(started.prompt_token_ids),
        seed=started.seed if started.HasField("seed") else None,
    )


def _prompt_logits(chunk: tensor_pb2.TensorChunk) -> events.PromptLogits:
    return events.PromptLogits(
        row_offset=chunk.row_offset, total_rows=chunk.total_rows, rows=_rows(chunk.rows)
    )


def _prompt_logprobs(logprobs: inference_pb2.PromptLogprobs) -> events.PromptLogprobs:
    return events.PromptLogprobs(offset=logprobs.offset, tokens=_logprobs(logprobs.tokens))


def _delta(delta: inference_pb2.Delta) -> events.Delta:
    return events.Delta(
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        reasoning_text=delta.reasoning_text,
        index=delta.index,
        logprobs=_logprobs(delta.logprobs),
    )


def _logprobs(wire: Iterable[inference_pb2.TokenLogprobs]) -> tuple[events.TokenLogprobs, ...]:
    return tuple(
        events.TokenLogprobs(_logprob(entry.token), tuple(map(_logprob, entry.top)))
        for entry in wire
    )


def _logprob(wire: inference_pb2.TokenLogprob) -> events.TokenLogprob:
    return events.TokenLogprob(wire.token_id, wire.logprob)


def _choice_finished(choice: inference_pb2.ChoiceFinished) -> events.ChoiceFinished:
    stop = choice.WhichOneof("stop")
    return events.ChoiceFinished(
        index=choice.index,
        reason=_REASONS.get(choice.reason, "other"),
        stop=None if stop is None else getattr(choice, stop),
        completion_tokens=choice.completion_tokens,
    )


def _finished(finished: inference_pb2.Finished) -> events.Finished:
    return events.Finished(
        reason=_REASONS.get(finished.reason, "other"),
        usage=usage(finished.usage),
        timings=_copy(events.Timings, finished.timings),
    )


def usage(message: inference_pb2.Usage) -> events.Usage:
    """Token counts of a message."""
    return _copy(events.Usage, message)


def model(message: inference_pb2.GetModelResponse) -> events.Model:
    """The description of a message."""
    return _copy(events.Model, message)


def _copy(cls: type[T], message: object) -> T:
    """A dataclass from the fields of a message that bear the same names."""
    names = (field.name for field in dataclasses.fields(cls))
    return cls(**{name: getattr(message, name) for name in names})


def _rows(wire: tensor_pb2.Tensor) -> events.Logits:
    shape = tuple(wire.shape)
    if wire.dtype != tensor_pb2.DTYPE_FLOAT32 or len(shape) != 2:
        raise errors.DataLoss(f"prompt_logits: not a float32 matrix but {shape}")
    if math.prod(shape) * 4 != len(wire.data) or google_crc32c.value(wire.data) != wire.crc32c:
        raise errors.DataLoss("prompt_logits: size or checksum mismatch")
    return np.frombuffer(wire.data, dtype="<f4").astype(np.float32).reshape(shape)


_EVENTS: dict[str, Callable[[Any], events.Event]] = {
    "started": _started,
    "delta": _delta,
    "prompt_logits": _prompt_logits,
    "prompt_logprobs": _prompt_logprobs,
    "choice_finished": _choice_finished,
    "finished": _finished,
}
