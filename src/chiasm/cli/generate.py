"""`chiasm generate`: one request, its answer as a stream of text or as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from chiasm import errors
from chiasm.cli import answers, failures, messages
from chiasm.client import Client, Delta, Media, Prompt, Sampling, user
from chiasm.telemetry import traces
from chiasm.transport.service import flush
from chiasm.types import MediaKind

DEFAULT_ENDPOINT = "127.0.0.1:8000"

Endpoint = Annotated[
    str, typer.Option(envvar="CHIASM_ENDPOINT", metavar="HOST:PORT", help="Address of the gateway.")
]
Timeout = Annotated[float, typer.Option(help="Seconds the whole request may take.")]


def generate(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    prompt: Annotated[
        str | None, typer.Option(help="Text of one user message; - reads stdin.")
    ] = None,
    messages_json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Conversation as a JSON list; - reads stdin."),
    ] = None,
    prompt_token_ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON list of token ids; - reads stdin.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Image; may be repeated.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Video; may be repeated.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens to generate; 0: as many as fit.")
    ] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random stream.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")] = None,
    top_k: Annotated[int, typer.Option(help="Most likely tokens to keep; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Least share of the likeliest token's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: against tokens of prompt and answer.")
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="Against tokens of the answer, in [-2, 2].")
    ] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once per occurrence.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends the answer; may be repeated.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Tokens before the answer may end.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: likeliest tokens to list at each place, 0 to 20."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Answers; more than one needs --json.")] = 1,
    response_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORM", help="File with a JSON Schema (- reads stdin), or regex:PATTERN."
        ),
    ] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of a thought.")] = None,
    enable_thinking: Annotated[
        bool, typer.Option("--enable-thinking", help="Let the model think first.")
    ] = False,
    timeout: Timeout = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
) -> None:
    """Sends one request to a gateway and prints the answer.

    Exit status: 0, or 2 for a request that was refused, or 1 for any other failure.
    """
    provider = traces.configure("cli", instance_id="generate")
    try:
        with failures.reported():
            if timeout <= 0:
                raise errors.InvalidArgument("--timeout", "must be more than 0")
            if not as_json and (n > 1 or logprobs is not None):
                raise errors.InvalidArgument("--json", "is needed for --n and --logprobs")
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                stop=stop or (),
                min_tokens=min_tokens,
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                n=n,
                response_format=answers.read_form(response_format, name="--response-format"),
                thinking_budget=thinking_budget,
            )
            request = build_prompt(
                prompt, messages_json, prompt_token_ids, image or (), video or ()
            )
            with Client(endpoint, timeout_s=timeout) as client:
                if as_json:
                    result = client.complete(
                        request, sampling=sampling, enable_thinking=enable_thinking
                    )
                    sys.stdout.write(json.dumps(answers.to_json(result)) + "\n")
                else:
                    _stream(client, request, sampling, enable_thinking)
    finally:
        flush(provider)


def build_prompt(
    text: str | None,
    messages_json: str | None,
    prompt_token_ids: str | None,
    image_paths: Sequence[str],
    video_paths: Sequence[str],
) -> Prompt:
    """The prompt that the options describe. Raises InvalidArgument, also for none or several."""
    if sum(option is not None for option in (text, messages_json, prompt_token_ids)) != 1:
        raise errors.InvalidArgument(
            "", "give one of --prompt, --messages-json and --prompt-token-ids"
        )
    images = messages.load_media(MediaKind.IMAGE, image_paths, name="--image")
    videos = messages.load_media(MediaKind.VIDEO, video_paths, name="--video")
    if messages_json is not None:
        return messages.load_messages(
            messages_json, images=images, videos=videos, name="--messages-json"
        )
    if prompt_token_ids is not None:
        return messages.load_tokens(
            prompt_token_ids, images=images, videos=videos, name="--prompt-token-ids"
        )
    media: list[Media] = [*images, *videos]
    return [user(*media, messages.read_text(text or "", name="--prompt"))]


def _stream(client: Client, prompt: Prompt, sampling: Sampling, enable_thinking: bool) -> None:
    """The answer to stdout as it comes, a thought before it to stderr."""
    out, aside = sys.stdout.buffer, sys.stderr.buffer
    for event in client.generate(prompt, sampling=sampling, enable_thinking=enable_thinking):
        if isinstance(event, Delta):
            aside.write(event.reasoning_text.encode())
            aside.flush()
            out.write(event.text.encode())
            out.flush()
    out.write(b"\n")
    out.flush()
