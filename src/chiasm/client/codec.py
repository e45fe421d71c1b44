"""Client values to messages and back: the only place of the client that knows both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import google_crc32c
import numpy as np

from chiasm import errors
from chiasm.client import events
from chiasm.client.messages import DEFAULT_SAMPLING, Media, Message, Prompt, Sampling, Text, Tokens
from chiasm.types import MediaKind
from chiasm.v1 import inference_pb2, tensor_pb2

T = TypeVar("T", events.Usage, events.Timings, events.Model)

_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1
_REASONS: dict[int, events.FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything of a request that is not its prompt."""

    sampling: Sampling = DEFAULT_SAMPLING
    enable_thinking: bool = False
    prompt_token_ids: bool = False
    prompt_logits: bool = False
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
    seed = sampling.seed
    return inference_pb2.SamplingParams(
        max_tokens=_integer("sampling.max_tokens", sampling.max_tokens),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=_integer("sampling.top_k", sampling.top_k),
        seed=None if seed is None else _integer("sampling.seed", seed, _UINT64_MAX),
        stop_token_ids=_integers("sampling.stop_token_ids", sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )


def _utf8(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise errors.InvalidArgument(field, "the text is not valid UTF-8") from None
    return value


def _integers(field: str, values: Sequence[int]) -> list[int]:
    return [_integer(f"{field}[{i}]", value) for i, value in enumerate(values)]


def _integer(field: str, value: int, maximum: int = _UINT32_MAX) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise errors.InvalidArgument(field, f"must be an integer in 0..{maximum}, not {value!r}")
    return value


def event(answer: inference_pb2.GenerateResponse) -> events.Event | None:
    """The event of a message; None for one this client does not know."""
    match answer.WhichOneof("event"):
        case "started":
            started = answer.started
            return events.Started(
                request_id=started.request_id,
                model=started.model,
                prompt_token_ids=tuple(started.prompt_token_ids),
            )
        case "delta":
            return events.Delta(text=answer.delta.text, token_ids=tuple(answer.delta.token_ids))
        case "prompt_logits":
            chunk = answer.prompt_logits
            return events.PromptLogits(
                row_offset=chunk.row_offset, total_rows=chunk.total_rows, rows=_rows(chunk.rows)
            )
        case "finished":
            return _finished(answer.finished)
    return None


def _finished(finished: inference_pb2.Finished) -> events.Finished:
    if finished.reason not in _REASONS:
        raise errors.Internal(f"the server sent finish reason {finished.reason}")
    return events.Finished(
        reason=_REASONS[finished.reason],
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


class Assembler:
    """Puts the events of one answer together."""

    def __init__(self) -> None:
        self._started: events.Started | None = None
        self._finished: events.Finished | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._rows: list[events.Logits] = []
        self._num_rows = self._total_rows = 0

    def add(self, new: events.Event) -> None:
        """Takes the next event. Raises DataLoss when rows of prompt logits are missing."""
        match new:
            case events.Started():
                self._started = new
            case events.Delta():
                self._text.append(new.text)
                self._token_ids.extend(new.token_ids)
            case events.PromptLogits():
                if new.row_offset != self._num_rows:
                    raise errors.DataLoss(f"prompt_logits: row {self._num_rows} is missing")
                self._rows.append(new.rows)
                self._num_rows += len(new.rows)
                self._total_rows = new.total_rows
            case events.Finished():
                self._finished = new

    def result(self) -> events.Result:
        """The whole answer. Raises DataLoss when its stream ended early."""
        if self._started is None or self._finished is None or self._num_rows != self._total_rows:
            raise errors.DataLoss("the answer ended before it was complete")
        return events.Result(
            request_id=self._started.request_id,
            model=self._started.model,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            prompt_token_ids=self._started.prompt_token_ids,
            finish_reason=self._finished.reason,
            usage=self._finished.usage,
            timings=self._finished.timings,
            prompt_logits=np.concatenate(self._rows) if self._rows else None,
        )


def assemble(answer: Iterable[events.Event]) -> events.Result:
    """The whole answer of a finished stream of events."""
    assembler = Assembler()
    for new in answer:
        assembler.add(new)
    return assembler.result()
