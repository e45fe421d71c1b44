"""What a client hears: the events of an answer, and the answer as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "other"]
"""Other: one that a newer server has and this client does not know."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by modality; delimiters of media count as text.

    cached_tokens: of the prompt's, those that were in the decoder's prefix cache.
    """

    prompt_tokens: int
    prompt_text_tokens: int
    prompt_image_tokens: int
    prompt_video_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in nanoseconds; the parts are described in inference.proto."""

    total_ns: int
    layout_ns: int
    encode_ns: int
    fetch_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    text_expert_wait_ns: int
    vision_expert_wait_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was accepted. `prompt_token_ids` is empty unless asked for. seed: the request's
    own or the gateway's choice; None from a gateway that does not tell."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    seed: int | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, and the likeliest ones in its place, likeliest first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of answer `index`; `text` may lag behind `token_ids`.

    reasoning_text: text of a thought. logprobs: one entry per id, when asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    reasoning_text: str = ""
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogits:
    """Logits of consecutive prompt positions: rows [n, V] of `total_rows`, from `row_offset`."""

    row_offset: int
    total_rows: int
    rows: Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens `offset`..; the prompt's first token has none."""

    offset: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceFinished:
    """Answer `index` is complete. `stop`: the stop string or stop token of the request's own that
    ended it, if one did."""

    index: int
    reason: FinishReason
    stop: str | int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended well."""

    reason: FinishReason
    usage: Usage
    timings: Timings


Event = Started | Delta | PromptLogits | PromptLogprobs | ChoiceFinished | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the answers to a request. `logprobs` has an entry per token when asked for."""

    index: int
    text: str
    reasoning_text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop: str | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All answers, in order of their index; the first one's fields are at hand as the result's.

    seed: with it the same request has the same answers. prompt_logits: [T, V], or None unless asked
    for. prompt_logprobs: an entry per prompt token but the first, when asked for.
    """

    request_id: str
    model: str
    seed: int | None
    choices: tuple[Choice, ...]
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    usage: Usage
    timings: Timings
    prompt_logits: Logits | None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning_text(self) -> str:
        return self.choices[0].reasoning_text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The served model and its gateway's limits."""

    name: str
    max_context_tokens: int
    vocab_size: int
    max_media_items: int
    max_media_bytes: int
    max_image_pixels: int
    dtype: str
    max_request_media_bytes: int
    max_text_bytes: int
    max_prompt_logits_bytes: int
