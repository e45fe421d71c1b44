"""The Python client of a chiasm gateway.

with Client("127.0.0.1:8000") as client:
    answer = client.complete([user(image("cat.jpg"), "What is this?")])
"""

from __future__ import annotations

from chiasm.client.aio import AsyncClient
from chiasm.client.events import (
    Choice,
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    Model,
    PromptLogits,
    PromptLogprobs,
    Result,
    Started,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from chiasm.client.messages import (
    JsonObject,
    JsonSchema,
    Media,
    Message,
    OneOf,
    Part,
    Prompt,
    Regex,
    ResponseFormat,
    Sampling,
    Text,
    Tokens,
    assistant,
    image,
    system,
    text,
    user,
    video,
)
from chiasm.client.sync import Client

__all__ = [
    "AsyncClient",
    "Choice",
    "ChoiceFinished",
    "Client",
    "Delta",
    "Event",
    "Finished",
    "JsonObject",
    "JsonSchema",
    "Media",
    "Message",
    "Model",
    "OneOf",
    "Part",
    "Prompt",
    "PromptLogits",
    "PromptLogprobs",
    "Regex",
    "ResponseFormat",
    "Result",
    "Sampling",
    "Started",
    "Text",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokens",
    "Usage",
    "assistant",
    "image",
    "system",
    "text",
    "user",
    "video",
]
