"""`chiasm generate`: one request, its answer as a stream of text or as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from chiasm import errors
from chiasm.cli import answers, connection, failures, messages, options
from chiasm.client import Client, Delta, Media, Prompt, Sampling, user
from chiasm.telemetry import traces
from chiasm.transport.service import flush
from chiasm.types import MediaKind

DEFAULT_ENDPOINT = "127.0.0.1:8000"

Endpoint = Annotated[
    str, typer.Option(envvar="CHIASM_ENDPOINT", metavar="HOST:PORT", help="Address of the gateway.")
]
Timeout = Annotated[float, typer.Option(help="Seconds the whole request may take.")]


@connection.options
def generate(
    context: typer.Context,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    prompt: options.Text = None,
    messages_json: options.MessagesJson = None,
    prompt_token_ids: options.PromptTokenIds = None,
    image: options.Images = None,
    video: options.Videos = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    top_p: options.TopP = None,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    min_tokens: options.MinTokens = 0,
    ignore_eos: options.IgnoreEos = False,
    logprobs: options.Logprobs = None,
    n: options.NumAnswers = 1,
    response_format: options.Form = None,
    thinking_budget: options.ThinkingBudget = None,
    enable_thinking: options.EnableThinking = False,
    timeout: Timeout = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
    *,
    access: connection.Access,
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
            sampling = options.read_sampling(context.params)
            request = build_prompt(
                prompt, messages_json, prompt_token_ids, image or (), video or ()
            )
            files, key = access.files(), access.api_key
            with Client(endpoint, timeout_s=timeout, tls=files, api_key=key) as client:
                show = _print_json if as_json else _stream
                show(client, request, sampling, enable_thinking)
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


def _print_json(client: Client, prompt: Prompt, sampling: Sampling, enable_thinking: bool) -> None:
    result = client.complete(prompt, sampling=sampling, enable_thinking=enable_thinking)
    sys.stdout.write(json.dumps(answers.to_json(result)) + "\n")


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
