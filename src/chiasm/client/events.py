"""What a client hears: the events of an answer, and the answer as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length"]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by modality; delimiters of media count as text."""

    prompt_tokens: int
    prompt_text_tokens: int
    prompt_image_tokens: int
    prompt_video_tokens: int
    completion_tokens: int


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
    """The request was accepted. `prompt_token_ids` is empty unless asked for."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output; `text` may lag behind `token_ids` by a partial character."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogits:
    """Logits of consecutive prompt positions: rows [n, V] of `total_rows`, from `row_offset`."""

    row_offset: int
    total_rows: int
    rows: Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended well."""

    reason: FinishReason
    usage: Usage
    timings: Timings


Event = Started | Delta | PromptLogits | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole answer. `prompt_logits` is [T, V], or None unless asked for."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    prompt_logits: Logits | None


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
