"""The rules of SamplingParams. Names, meanings and limits are vLLM's where it has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from chiasm import errors
from chiasm.services.gateway import grammars
from chiasm.services.gateway.domain import Grammar, Sampling
from chiasm.v1 import inference_pb2

MAX_LOGPROBS = 20
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION, MAX_REPETITION = float(np.float32(0.01)), 100.0
"""Beyond these a logit can leave the range of float32, in which they come: 0.01 is less there."""

_PATH = "sampling"


def sampling(
    wire: inference_pb2.SamplingParams, *, vocab_size: int, max_context_tokens: int
) -> Sampling:
    """Valid sampling parameters with defaults filled in. Raises InvalidArgument."""
    temperature = wire.temperature if wire.HasField("temperature") else 1.0
    _require(
        math.isfinite(temperature) and temperature >= 0,
        "temperature",
        f"must be a finite number >= 0, not {temperature}",
    )
    top_p = wire.top_p if wire.HasField("top_p") else 1.0
    _require(0 < top_p <= 1, "top_p", f"must lie in (0, 1], not {top_p}")
    _require(0 <= wire.min_p <= 1, "min_p", f"must lie in [0, 1], not {wire.min_p}")
    repetition_penalty = wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0
    _require(
        MIN_REPETITION <= repetition_penalty <= MAX_REPETITION,
        "repetition_penalty",
        f"must lie in [{MIN_REPETITION:g}, {MAX_REPETITION:g}], not {repetition_penalty:g}",
    )
    _penalty("presence_penalty", wire.presence_penalty)
    _penalty("frequency_penalty", wire.frequency_penalty)
    _at_most(len(wire.stop_token_ids), MAX_STOP_TOKEN_IDS, "stop_token_ids", "ids")
    check_ids(f"{_PATH}.stop_token_ids", wire.stop_token_ids, vocab_size)
    _bounded(wire.thinking_budget, max_context_tokens, "thinking_budget")
    num_choices = _num_choices(wire.n, temperature)
    _lengths(wire, max_context_tokens)
    return Sampling(
        max_tokens=wire.max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=_logit_bias(wire, vocab_size),
        seed=wire.seed if wire.HasField("seed") else None,
        stop=_stop(wire.stop),
        include_stop=wire.include_stop_str_in_output,
        stop_token_ids=tuple(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        min_tokens=wire.min_tokens,
        logprobs=_logprobs("logprobs", wire),
        prompt_logprobs=_logprobs("prompt_logprobs", wire),
        num_choices=num_choices,
        thinking_budget=wire.thinking_budget if wire.HasField("thinking_budget") else None,
        grammar=_grammar(wire),
    )


def check_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidArgument that names the first id outside the vocabulary."""
    if max(token_ids, default=0) < vocab_size:
        return  # of millions, too, within milliseconds
    for i, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise errors.InvalidArgument(
                f"{field}[{i}]", f"{token_id} is outside the vocabulary of {vocab_size}"
            )


def _lengths(wire: inference_pb2.SamplingParams, max_context_tokens: int) -> None:
    _bounded(wire.max_tokens, max_context_tokens, "max_tokens")
    _bounded(wire.min_tokens, max_context_tokens, "min_tokens")
    _require(
        not wire.max_tokens or wire.min_tokens <= wire.max_tokens,
        "min_tokens",
        f"{wire.min_tokens} is more than max_tokens, {wire.max_tokens}",
    )


def _num_choices(n: int, temperature: float) -> int:
    _at_most(n, MAX_N, "n", "answers")
    _require(n <= 1 or temperature > 0, "n", "greedy answers are all the same: n must be 1")
    return n or 1


def _stop(stops: Sequence[str]) -> tuple[str, ...]:
    _at_most(len(stops), MAX_STOPS, "stop", "strings")
    for i, stop in enumerate(stops):
        _require(bool(stop), f"stop[{i}]", "the string is empty")
        _at_most(len(stop), MAX_STOP_CHARS, f"stop[{i}]", "characters")
    return tuple(stops)


def _logit_bias(
    wire: inference_pb2.SamplingParams, vocab_size: int
) -> tuple[tuple[int, float], ...]:
    _at_most(len(wire.logit_bias), MAX_LOGIT_BIASES, "logit_bias", "entries")
    for token_id, bias in wire.logit_bias.items():
        field = f"logit_bias[{token_id}]"
        _require(token_id < vocab_size, field, f"is outside the vocabulary of {vocab_size}")
        _require(
            abs(bias) <= MAX_BIAS, field, f"must lie in [-{MAX_BIAS:g}, {MAX_BIAS:g}], not {bias}"
        )
    return tuple(sorted(wire.logit_bias.items()))


def _logprobs(name: str, wire: inference_pb2.SamplingParams) -> int | None:
    if not wire.HasField(name):
        return None
    count = int(getattr(wire, name))
    _at_most(count, MAX_LOGPROBS, name, "tokens")
    return count


def _grammar(wire: inference_pb2.SamplingParams) -> Grammar | None:
    """The answer ends where its grammar does, so nothing else may hold its end back."""
    if not wire.HasField("response_format"):
        return None
    together = "cannot be used together with response_format"
    _require(not wire.ignore_eos, "ignore_eos", together)
    _require(not wire.min_tokens, "min_tokens", together)
    return grammars.grammar(wire.response_format, f"{_PATH}.response_format")


def _penalty(name: str, value: float) -> None:
    _require(
        abs(value) <= MAX_PENALTY,
        name,
        f"must lie in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], not {value}",
    )


def _bounded(value: int, max_context_tokens: int, name: str) -> None:
    _require(
        value < max_context_tokens,
        name,
        f"{value} does not fit the context of {max_context_tokens}",
    )


def _at_most(value: int, limit: int, name: str, what: str) -> None:
    _require(value <= limit, name, f"{value} {what}, limit {limit}")


def _require(is_met: bool, name: str, message: str) -> None:
    if not is_met:
        raise errors.InvalidArgument(f"{_PATH}.{name}", message)
