"""The OpenAI backend against a small HTTP server of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from chiasm import errors
from chiasm.bench.backend import Done, Exchange, RequestFailed, Tokens
from chiasm.bench.openai_backend import OpenAIBackend
from chiasm.bench.workload import Passage, Picture, Turn

Bodies = list[dict[str, Any]]
Answer = Callable[[dict[str, Any]], list[str]]

TURN = Turn(prefix=Passage((1,), 3), passage=Passage((2,), 6), max_tokens=4)
WITH_IMAGE = Turn(passage=Passage((2,), 6), pictures=(Picture((3,), 20, 10),), max_tokens=2)


def _chat(body: dict[str, Any]) -> list[str]:
    pieces: list[object] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    pieces += [{"choices": [{"delta": {"content": f"w{i}"}}]} for i in range(body["max_tokens"])]
    pieces.append({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 4}})
    return [*(f"data: {json.dumps(p)}" for p in pieces), ": a comment", "data: [DONE]"]


def _text(body: dict[str, Any]) -> list[str]:
    pieces = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "stop"}]}]
    return [*(f"data:{json.dumps(p)}" for p in pieces), "data: [DONE]"]


@contextlib.asynccontextmanager
async def _server(answer: Answer, status: int = 200) -> AsyncIterator[tuple[str, Bodies]]:
    bodies: Bodies = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("get /v1/models"):
            lines, kind = ['{"data": [{"id": "some-model"}]}'], "application/json"
        else:
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            bodies.append(json.loads(await reader.readexactly(length)))
            bodies[-1]["head"] = head
            lines, kind = answer(bodies[-1]), "text/event-stream"
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n".encode())
        writer.write(b"Connection: close\r\n\r\n")
        for line in lines:
            writer.write(f"{line}\n\n".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", bodies
    finally:
        server.close()


async def _connected(url: str, *, has_images: bool = False, model: str = "") -> OpenAIBackend:
    return await OpenAIBackend.connect(
        url,
        model=model,
        has_images=has_images,
        temperature=0.0,
        ignore_eos=True,
        api_key="secret",
    )


async def test_chat_with_images_and_history() -> None:
    async with _server(_chat) as (base, bodies):
        backend = await _connected(f"{base}/chat/completions", has_images=True)
        assert await backend.describe() == {"name": "some-model"}
        call = backend.prepare([Exchange(TURN, "an answer", ())], WITH_IMAGE)
        events = [event async for event in call(10.0)]
        await backend.close()
    assert events == [Tokens(1, "w0"), Tokens(1, "w1"), Done(input_tokens=11, output_tokens=4)]
    (body,) = bodies
    assert "authorization: bearer secret" in body["head"]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("some-model", 2, True)
    assert body["stream_options"] == {"include_usage": True}
    first, answer, second = body["messages"]
    assert len(first["content"].split()) == 9
    assert answer == {"role": "assistant", "content": "an answer"}
    image, text = second["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert len(text["text"].split()) == 6


async def test_separators_of_unicode_within_a_token() -> None:
    """Servers that do not escape them: a line of an event stream ends at CR and LF alone."""
    pieces = ["a\u2028b", "c\u0085", "\u2029"]

    def answer(_: dict[str, Any]) -> list[str]:
        chunks = [json.dumps({"choices": [{"text": p}]}, ensure_ascii=False) for p in pieces]
        return [*(f"data: {chunk}\r" for chunk in chunks), "data: [DONE]", ": and more"]

    async with _server(answer) as (base, _):
        backend = await _connected(f"{base}/completions", model="mine")
        events = [event async for event in backend.prepare((), TURN)(10.0)]
        await backend.close()
    assert events[:-1] == [Tokens(1, piece) for piece in pieces]
    assert isinstance(events[-1], Done)


@pytest.mark.parametrize("chunk", [{"choices": [None]}, {"choices": 3}, {"usage": "much"}])
async def test_chunks_of_the_wrong_kind_fail_their_request(chunk: dict[str, Any]) -> None:
    async with _server(lambda _: [f"data: {json.dumps(chunk)}", "data: [DONE]"]) as (base, _):
        backend = await _connected(f"{base}/completions", model="mine")
        with pytest.raises(RequestFailed) as failed:
            _ = [event async for event in backend.prepare((), TURN)(10.0)]
        await backend.close()
    assert failed.value.reason == "MALFORMED_ANSWER"


async def test_completions_without_usage() -> None:
    async with _server(_text) as (base, bodies):
        backend = await _connected(f"{base}/completions", model="mine")
        events = [event async for event in backend.prepare((), TURN)(10.0)]
        await backend.close()
    assert events == [Tokens(1, "a"), Tokens(1, "b"), Done()]
    assert bodies[0]["model"] == "mine"
    assert len(bodies[0]["prompt"].split()) == 9


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        (["{}"], 429, "HTTP_429"),
        (["data: {"], 200, "MALFORMED_ANSWER"),
        (['data: {"error": {"message": "no"}}'], 200, "SERVER_ERROR"),
    ],
)
async def test_failures_have_reasons(lines: list[str], status: int, reason: str) -> None:
    async with _server(lambda body: lines, status) as (base, _):
        backend = await _connected(f"{base}/completions", model="mine")
        with pytest.raises(RequestFailed) as caught:
            _ = [event async for event in backend.prepare((), TURN)(10.0)]
        await backend.close()
    assert caught.value.reason == reason


async def test_endpoints_that_cannot_be() -> None:
    with pytest.raises(errors.InvalidArgument, match="completions"):
        await _connected("http://127.0.0.1:1/v1")
    with pytest.raises(errors.InvalidArgument, match="no images"):
        await _connected("http://127.0.0.1:1/v1/completions", has_images=True)
    with pytest.raises(errors.Unavailable):
        await _connected("http://127.0.0.1:1/v1/completions")
    backend = await _connected("http://127.0.0.1:1/v1/completions", model="mine")
    with pytest.raises(RequestFailed) as caught:
        _ = [event async for event in backend.prepare((), TURN)(5.0)]
    assert caught.value.reason == "UNAVAILABLE"
    await backend.close()
