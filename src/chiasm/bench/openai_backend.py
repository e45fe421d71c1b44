"""Any server that speaks OpenAI's HTTP API with server-sent events, such as vLLM.

The endpoint is the whole URL: .../v1/chat/completions takes text and images, .../v1/completions
text alone. Prompts are words, about a token each; the server's `usage` says how many they were.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from chiasm import errors
from chiasm.bench import content
from chiasm.bench.backend import Call, Done, Event, Exchange, RequestFailed, Tokens
from chiasm.bench.workload import Turn

CHAT, COMPLETIONS = "/chat/completions", "/completions"
CONNECT_TIMEOUT_S = 10.0
_MAX_ERROR_CHARS = 300


class OpenAIBackend:
    """Streams answers over HTTP/1.1, one connection a request in flight."""

    def __init__(
        self, url: str, *, model: str, temperature: float, ignore_eos: bool, api_key: str
    ) -> None:
        self._url, self.model = url, model
        self._options: dict[str, object] = {
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            self._options["ignore_eos"] = True  # an extension that vLLM and SGLang share
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        model: str,
        has_images: bool,
        temperature: float,
        ignore_eos: bool,
        api_key: str = "",
    ) -> OpenAIBackend:
        """Asks for the model's name unless it is given. Raises chiasm.errors."""
        if not url.endswith(COMPLETIONS):
            raise errors.InvalidArgument(
                "--endpoint", f"{url!r} ends neither in {CHAT} nor in {COMPLETIONS}"
            )
        if has_images and not url.endswith(CHAT):
            raise errors.InvalidArgument("--image-share", f"{url!r} takes no images")
        backend = cls(
            url, model=model, temperature=temperature, ignore_eos=ignore_eos, api_key=api_key
        )
        try:
            backend.model = model or await backend._first_model()
        except BaseException:
            await backend.close()
            raise
        return backend

    async def describe(self) -> dict[str, object]:
        """The model's name."""
        return {"name": self.model}

    def prepare(self, history: Sequence[Exchange], turn: Turn) -> Call:
        """The request's body, as bytes."""
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": turn.max_tokens,
            **self._options,
        }
        if self._url.endswith(CHAT):
            body["messages"] = _messages(history, turn)
        else:
            body["prompt"] = "".join(f"{_text(e.turn)}{e.text}\n" for e in history) + _text(turn)
        encoded = json.dumps(body).encode()

        def call(timeout_s: float) -> AsyncGenerator[Event, None]:
            return self._stream(encoded, timeout_s)

        return call

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.aclose()

    async def _first_model(self) -> str:
        base = self._url.removesuffix(COMPLETIONS).removesuffix("/chat")
        try:
            answer = await self._http.get(f"{base}/models", timeout=CONNECT_TIMEOUT_S)
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise errors.Unavailable(f"{base}/models: {error or type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise errors.InvalidArgument("--model", f"{base}/models names none") from None

    async def _stream(self, body: bytes, timeout_s: float) -> AsyncGenerator[Event, None]:
        try:
            async with self._http.stream(
                "POST",
                self._url,
                content=body,
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            ) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise RequestFailed(f"HTTP_{answer.status_code}")
                async for event in _events(answer):
                    yield event
        except httpx.ConnectError as error:
            raise RequestFailed("UNAVAILABLE", str(error)) from None
        except httpx.TimeoutException as error:
            raise RequestFailed("TIMEOUT", str(error)) from None
        except httpx.HTTPError as error:
            raise RequestFailed("CONNECTION_BROKEN", str(error)) from None


async def _events(answer: httpx.Response) -> AsyncGenerator[Event, None]:
    """Tokens for every chunk with text; one Done at the terminator, with the usage if it came."""
    usage: dict[str, Any] = {}
    is_done = False
    async for line in _lines(answer):
        # The rest is read, too: a connection whose answer was not read whole is not used again.
        if is_done or not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            is_done = True
            yield Done(
                input_tokens=usage.get("prompt_tokens"),
                output_tokens=usage.get("completion_tokens"),
            )
            continue
        chunk = _chunk(data)
        try:
            usage = dict(chunk.get("usage") or usage)
            texts = [_choice_text(choice) for choice in chunk.get("choices") or ()]
        except (AttributeError, TypeError, ValueError):
            raise RequestFailed("MALFORMED_ANSWER", data[:_MAX_ERROR_CHARS]) from None
        for text in filter(None, texts):
            yield Tokens(1, text)


async def _lines(answer: httpx.Response) -> AsyncGenerator[str, None]:
    """Lines as server-sent events have them: other separators of Unicode may stand in a token."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode(errors="replace")
    yield rest.decode(errors="replace")


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestFailed("MALFORMED_ANSWER", data[:_MAX_ERROR_CHARS]) from None
    if not isinstance(chunk, dict):
        raise RequestFailed("MALFORMED_ANSWER", data[:_MAX_ERROR_CHARS])
    if "error" in chunk:
        raise RequestFailed("SERVER_ERROR", str(chunk["error"])[:_MAX_ERROR_CHARS])
    return chunk


def _choice_text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return str(choice.get("text") or "")
    return str(
        delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    )


def _messages(history: Sequence[Exchange], turn: Turn) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for exchange in history:
        messages.append(_user(exchange.turn))
        messages.append({"role": "assistant", "content": exchange.text})
    return [*messages, _user(turn)]


def _user(turn: Turn) -> dict[str, object]:
    if not turn.pictures:
        return {"role": "user", "content": _text(turn)}
    parts: list[dict[str, object]] = []
    if turn.prefix:
        parts.append({"type": "text", "text": content.text(turn.prefix) + "\n"})
    for picture in turn.pictures:
        url = "data:image/jpeg;base64," + base64.b64encode(content.jpeg(picture)).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": content.text(turn.passage)})
    return {"role": "user", "content": parts}


def _text(turn: Turn) -> str:
    prefix = content.text(turn.prefix) + "\n" if turn.prefix else ""
    return prefix + content.text(turn.passage)
