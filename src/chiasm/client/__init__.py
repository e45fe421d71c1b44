"""The Python client of a chiasm gateway.

with Client("127.0.0.1:8000") as client:
    answer = client.complete([user(image("cat.jpg"), "What is this?")])
"""

from __future__ import annotations

from chiasm.client.aio import AsyncClient
from chiasm.client.events import (
    Delta,
    Event,
    Finished,
    Model,
    PromptLogits,
    Result,
    Started,
    Timings,
    Usage,
)
from chiasm.client.messages import (
    Media,
    Message,
    Part,
    Prompt,
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
    "Client",
    "Delta",
    "Event",
    "Finished",
    "Media",
    "Message",
    "Model",
    "Part",
    "Prompt",
    "PromptLogits",
    "Result",
    "Sampling",
    "Started",
    "Text",
    "Timings",
    "Tokens",
    "Usage",
    "assistant",
    "image",
    "system",
    "text",
    "user",
    "video",
]
