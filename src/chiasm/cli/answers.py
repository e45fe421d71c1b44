"""What is asked of an answer's form, and answers as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from chiasm.cli import messages
from chiasm.client import Choice, JsonSchema, Regex, ResponseFormat, Result, TokenLogprobs

_REGEX = "regex:"


def read_form(option: str | None, *, name: str) -> ResponseFormat | None:
    """A response format from a file with a JSON Schema or from `regex:PATTERN`."""
    if option is None:
        return None
    if option.startswith(_REGEX):
        return Regex(option.removeprefix(_REGEX))
    return JsonSchema(messages.decoded(messages.read_file(option, name=name), name))


def to_json(result: Result) -> dict[str, object]:
    """All answers as one JSON object; `choices` only when there are several."""
    found: dict[str, object] = {
        "request_id": result.request_id,
        "model": result.model,
        **_choice(result.choices[0]),
        "prompt_token_ids": list(result.prompt_token_ids),
        "usage": dataclasses.asdict(result.usage),
        "timings": dataclasses.asdict(result.timings),
    }
    if len(result.choices) > 1:
        found["choices"] = [{"index": choice.index, **_choice(choice)} for choice in result.choices]
    return found


def _choice(choice: Choice) -> dict[str, object]:
    found: dict[str, object] = {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
    }
    if choice.reasoning_text:
        found["reasoning_text"] = choice.reasoning_text
    if choice.logprobs:
        found["logprobs"] = _logprobs(choice.logprobs)
    return found


def _logprobs(logprobs: Sequence[TokenLogprobs]) -> list[dict[str, object]]:
    return [
        {**dataclasses.asdict(entry.token), "top": [dataclasses.asdict(t) for t in entry.top]}
        for entry in logprobs
    ]
