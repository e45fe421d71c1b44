"""Options of commands that ask a gateway for answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from chiasm.cli import answers
from chiasm.client import Sampling

Text = Annotated[str | None, typer.Option(help="Text of one user message; - reads stdin.")]
MessagesJson = Annotated[
    str | None, typer.Option(metavar="FILE", help="Conversation as a JSON list; - reads stdin.")
]
PromptTokenIds = Annotated[
    str | None, typer.Option(metavar="FILE", help="JSON list of token ids; - reads stdin.")
]
Images = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Image; may be repeated.")]
Videos = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Video; may be repeated.")]

MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate; 0: as many as fit.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the random stream.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")]
TopK = Annotated[int, typer.Option(help="Most likely tokens to keep; 0: all.")]
MinP = Annotated[float, typer.Option(help="Least share of the likeliest token's probability.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: against tokens of prompt and answer.")
]
PresencePenalty = Annotated[float, typer.Option(help="Against tokens of the answer, in [-2, 2].")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, once per occurrence.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="String that ends the answer; may be repeated.")
]
MinTokens = Annotated[int, typer.Option(help="Tokens before the answer may end.")]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.")
]
Logprobs = Annotated[
    int | None, typer.Option(help="With --json: likeliest tokens to list at each place, 0 to 20.")
]
NumAnswers = Annotated[int, typer.Option("--n", help="Answers; more than one needs --json.")]
Form = Annotated[
    str | None,
    typer.Option(metavar="FORM", help="File with a JSON Schema (- reads stdin), or regex:PATTERN."),
]
ThinkingBudget = Annotated[int | None, typer.Option(help="Most tokens of a thought.")]
EnableThinking = Annotated[
    bool, typer.Option("--enable-thinking", help="Let the model think first.")
]


def read_sampling(params: Mapping[str, Any]) -> Sampling:
    """Sampling from a command's options, which bear the names of its fields."""
    names = {field.name for field in dataclasses.fields(Sampling)}
    given = {name: value for name, value in params.items() if name in names}
    form = answers.read_form(given.pop("response_format"), name="--response-format")
    return Sampling(**{**given, "stop": given["stop"] or (), "response_format": form})
