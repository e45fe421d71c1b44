"""One request inside the engine. No torch: media embeddings are carried, never looked into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from opentelemetry import context as otel_context
from opentelemetry import trace

from chiasm import errors
from chiasm.services.decoder.blocks import BlockTable
from chiasm.types import TOKEN_TEXT, Modality


class FinishReason(StrEnum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Validated sampling parameters; `max_tokens` fits the context.

    stop_token_ids: with the model's end-of-sequence ids, unless those are to be ignored.
    think_end_ids: the tokens that end a thought; empty when the prompt does not end within one.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    think_end_ids: tuple[int, ...] = ()
    thinking_budget: int | None = None


@dataclass(slots=True, kw_only=True)
class SequenceTimings:
    """Nanoseconds; instants are time.monotonic_ns()."""

    submitted: int = 0
    admitted: int = 0
    first_token: int = 0
    finished: int = 0
    expert_wait: dict[Modality, int] = field(default_factory=lambda: dict.fromkeys(Modality, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """A generated token, with its log-probability and the likeliest ones when asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogitsEvent:
    """Logits of prompt positions `offset`..; rows: float32 tensor [N, V]."""

    offset: int
    rows: Any


class RankedToken(NamedTuple):
    """A token, its log-probability, and the likeliest ids with theirs, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobsEvent:
    """Prompt tokens `offset`.. with their log-probabilities."""

    offset: int
    tokens: tuple[RankedToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The request ended well."""

    reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent:
    """The request ended with an error."""

    error: errors.ChiasmError


Event = TokenEvent | PromptLogitsEvent | PromptLogprobsEvent | FinishedEvent | FailedEvent


class MediaRows(NamedTuple):
    """Tokens [offset, offset + num_tokens) are a media item; embeddings: tensor [num_tokens, H]."""

    offset: int
    num_tokens: int
    digest: str
    embeddings: Any


@dataclass(slots=True, kw_only=True)
class TracedPhase:
    """A request's prefill or decode in its trace; the default is for a request without one.

    num_steps_left: how many more of its steps are traced in detail. expert_wait: nanoseconds that
    the request had waited for either pool before.
    """

    span: trace.Span = trace.INVALID_SPAN
    num_steps_left: int = 0
    expert_wait: dict[Modality, int] = field(default_factory=lambda: dict.fromkeys(Modality, 0))


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """State of a request from submission to its last event.

    prompt_types: routing type per prompt token. positions: int64 [3, prompt]; generated token j has
    position next_position + j on all three axes.

    The scheduler's books: the blocks of `table` hold the keys and values of the first tokens,
    `num_computed` of which are there; `digests` of full blocks, `num_sealed` of which can be found
    by others; `num_cached` tokens came from the prefix cache at the last admission.
    `num_prompt_cached`: tokens of the prompt that came from there at the first one.

    is_behind: whether so much is unread that no more may be computed for now.
    num_resumed: how many of the first `token_ids` were generated elsewhere, before this sequence.
    matcher: the grammar's automaton (grammars.Matcher), in its first state. processors: the
    sampler's books; they follow from the rest and can be made again at any time. drafts: likewise
    those of speculation (speculation.Drafts).
    held_ns, num_text: time of the steps in which it had a part, and text tokens computed for it.
    phase: where the request is in its trace (spans.py).
    """

    request_id: str
    token_ids: list[int]
    prompt_types: bytes
    positions: npt.NDArray[np.int64]
    next_position: int
    media: tuple[MediaRows, ...]
    sampling: Sampling
    prompt_logits: bool
    sink: Callable[[Event], None] = field(default=lambda _: None)
    is_behind: Callable[[], bool] = field(default=lambda: False)
    trace_context: otel_context.Context = field(default_factory=otel_context.Context)
    num_prompt: int = field(init=False)
    priority: int = 0
    arrival: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    digests: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_sealed: int = 0
    num_cached: int = 0
    num_prompt_cached: int = 0
    num_logits_sent: int = 0
    num_resumed: int = 0
    matcher: Any = None
    processors: Any = None
    drafts: Any = None
    parked_since: int | None = None
    aborted: bool = False
    held_ns: int = 0
    num_text: int = 0
    timings: SequenceTimings = field(default_factory=SequenceTimings)
    phase: TracedPhase = field(default_factory=TracedPhase)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids) - self.num_resumed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether logits of every prompt position are wanted, so that all must be computed."""
        return self.prompt_logits or self.sampling.prompt_logprobs is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer is complete with its last token, if it is."""
        if not self.num_generated:
            return None
        if self.token_ids[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated >= self.sampling.max_tokens else None

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Tokens of KV cache the request may come to need."""
        return self.num_prompt + self.sampling.max_tokens

    def types(self, start: int, stop: int) -> bytes:
        """Routing types of tokens [start, stop). Generated ones have none where a prompt of those
        tokens would have others, or other positions."""
        types = self.prompt_types[start:stop]
        ends_in_text = self.prompt_types[-1] == TOKEN_TEXT
        if ends_in_text and (self.positions[:, -1] + 1 == self.next_position).all():
            return types.ljust(stop - start, bytes((TOKEN_TEXT,)))
        return types

    def modalities(self, start: int, stop: int) -> frozenset[Modality]:
        """Banks that tokens [start, stop) are routed to; generated tokens are text."""
        types = self.prompt_types[start:stop]
        num_text = types.count(TOKEN_TEXT) + max(0, stop - max(start, self.num_prompt))
        found = set()
        if num_text:
            found.add(Modality.TEXT)
        if num_text < stop - start:
            found.add(Modality.VISION)
        return frozenset(found)
