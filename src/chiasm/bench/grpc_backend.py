"""A chiasm gateway over gRPC."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from chiasm import client, errors
from chiasm.bench import content
from chiasm.bench.backend import Call, Done, Event, Exchange, RequestFailed, Tokens
from chiasm.bench.workload import Picture, Turn
from chiasm.types import TlsFiles

READY_TIMEOUT_S = 30.0
_FIRST_ID = 3
_PROBE = Picture((0,), 112, 112)

Form = Literal["tokens", "chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ids:
    """Token ids to write prompts with: random text from low..high-1, and a picture's three."""

    low: int
    high: int
    picture: tuple[int, int, int] | None


class GrpcBackend:
    """Sends prompts as token ids, whose lengths are exact, or as chat messages."""

    def __init__(
        self,
        connection: client.AsyncClient,
        *,
        form: Form,
        ids: Ids,
        temperature: float,
        ignore_eos: bool,
    ) -> None:
        self._client, self._form, self._ids = connection, form, ids
        self._temperature, self._ignore_eos = temperature, ignore_eos

    @classmethod
    async def connect(
        cls,
        endpoint: str,
        *,
        form: Form,
        has_images: bool,
        temperature: float,
        ignore_eos: bool,
        tls: TlsFiles | None = None,
        api_key: str = "",
    ) -> GrpcBackend:
        """Waits until the gateway serves and learns its token ids. Raises chiasm.errors."""
        connection = client.AsyncClient(endpoint, tls=tls, api_key=api_key)
        try:
            await connection.wait_ready(READY_TIMEOUT_S)
            ids = await _probe(connection, has_images=has_images)
        except BaseException:
            await connection.close()
            raise
        return cls(connection, form=form, ids=ids, temperature=temperature, ignore_eos=ignore_eos)

    async def describe(self) -> dict[str, object]:
        """The gateway's model and limits."""
        return dataclasses.asdict(await self._client.get_model())

    def prepare(self, history: Sequence[Exchange], turn: Turn) -> Call:
        """Raises InvalidArgument for pictures that were not announced to `connect`."""
        prompt: client.Prompt
        if self._form == "chat":
            prompt = _messages(history, turn)
        else:
            prompt = self._token_prompt(history, turn)
        sampling = client.Sampling(
            max_tokens=turn.max_tokens, temperature=self._temperature, ignore_eos=self._ignore_eos
        )

        def call(timeout_s: float) -> AsyncGenerator[Event, None]:
            return self._stream(prompt, sampling, timeout_s)

        return call

    async def close(self) -> None:
        """Ends the connection."""
        await self._client.close()

    async def _stream(
        self, prompt: client.Prompt, sampling: client.Sampling, timeout_s: float
    ) -> AsyncGenerator[Event, None]:
        events = self._client.generate(prompt, sampling=sampling, timeout_s=timeout_s)
        assert isinstance(events, AsyncGenerator)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, client.Delta):
                        if self._is_heard(event):
                            yield Tokens(len(event.token_ids), event.text, event.token_ids)
                    elif isinstance(event, client.Finished):
                        yield _done(event)
        except errors.ChiasmError as error:
            raise RequestFailed(error.reason, error.message) from None

    def _is_heard(self, delta: client.Delta) -> bool:
        """In a chat it is text that counts, as over HTTP."""
        if self._form == "chat":
            return bool(delta.text or delta.reasoning_text)
        return bool(delta.token_ids)

    def _token_prompt(self, history: Sequence[Exchange], turn: Turn) -> client.Tokens:
        token_ids: list[int] = []
        images: list[client.Media] = []
        for exchange in history:
            self._write(exchange.turn, token_ids, images)
            token_ids += exchange.token_ids
        self._write(turn, token_ids, images)
        return client.Tokens(token_ids=token_ids, images=images)

    def _write(self, turn: Turn, token_ids: list[int], images: list[client.Media]) -> None:
        ids = self._ids
        if turn.prefix:
            token_ids += content.token_ids(turn.prefix, ids.low, ids.high)
        for picture in turn.pictures:
            if ids.picture is None:
                raise errors.InvalidArgument("pictures", "the token ids of images are not known")
            token_ids += ids.picture
            images.append(client.image(content.jpeg(picture)))
        token_ids += content.token_ids(turn.passage, ids.low, ids.high)


async def _probe(connection: client.AsyncClient, *, has_images: bool) -> Ids:
    """Ids as the gateway itself lays a small prompt out; no tokenizer is needed here.

    Ordinary tokens come before the special ones, of which the template's first token is one.
    """
    model = await connection.get_model()
    parts = [client.image(content.jpeg(_PROBE))] if has_images else []
    answer = await connection.complete(
        [client.user(*parts, "x")],
        sampling=client.Sampling(max_tokens=1, temperature=0),
        timeout_s=READY_TIMEOUT_S,
    )
    laid_out = answer.prompt_token_ids
    special = [i for i in laid_out[:1] if i > _FIRST_ID] + [model.vocab_size]
    picture = None
    if has_images:
        picture = _picture_ids(laid_out)
        special += picture
    return Ids(low=_FIRST_ID, high=max(min(special), _FIRST_ID + 1), picture=picture)


def _picture_ids(laid_out: Sequence[int]) -> tuple[int, int, int]:
    """Start, placeholder and end: the placeholder is the longest run of one id."""
    runs = [(token_id, len(list(run))) for token_id, run in groupby(laid_out)]
    at = max(range(len(runs)), key=lambda i: runs[i][1])
    if not 0 < at < len(runs) - 1:
        raise errors.FailedPrecondition("the gateway's prompt has no image between delimiters")
    return runs[at - 1][0], runs[at][0], runs[at + 1][0]


def _messages(history: Sequence[Exchange], turn: Turn) -> list[client.Message]:
    messages: list[client.Message] = []
    for exchange in history:
        messages += [_user(exchange.turn), client.assistant(exchange.text or " ")]
    return [*messages, _user(turn)]


def _user(turn: Turn) -> client.Message:
    parts: list[client.Part | str] = [content.text(turn.prefix) + "\n"] if turn.prefix else []
    parts += [client.image(content.jpeg(picture)) for picture in turn.pictures]
    return client.user(*parts, content.text(turn.passage))


def _done(event: client.Finished) -> Done:
    timings = dataclasses.asdict(event.timings)
    return Done(
        input_tokens=event.usage.prompt_tokens,
        output_tokens=event.usage.completion_tokens,
        timings_ns={name.removesuffix("_ns"): ns for name, ns in timings.items()},
    )
