"""A client whose stream breaks off asks for the rest of it, and its caller sees one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from loopback import listening

from chiasm import errors
from chiasm.client import AsyncClient, Client, Sampling
from chiasm.client.events import ChoiceFinished, Delta, Event, Finished, PromptLogprobs, Started
from chiasm.client.resumption import MAX_FRUITLESS, PAUSE_S
from chiasm.transport.interceptors import CallInterceptor
from chiasm.v1 import inference_pb2, inference_pb2_grpc

Response = inference_pb2.GenerateResponse
Ask = Callable[..., Any]

STARTED = Response(started=inference_pb2.Started(request_id="r", model="m", seed=5))
LAST_TEXT = Response(delta=inference_pb2.Delta(text="held back"))
CHOICE = Response(choice_finished=inference_pb2.ChoiceFinished(completion_tokens=3))
FINISHED = Response(finished=inference_pb2.Finished())
PROMPT = Response(
    prompt_logprobs=inference_pb2.PromptLogprobs(offset=1, tokens=[inference_pb2.TokenLogprobs()])
)
LOST = grpc.StatusCode.UNAVAILABLE


def said(*token_ids: int, index: int = 0) -> Response:
    text = "".join(f"<{token_id}>" for token_id in token_ids)
    return Response(delta=inference_pb2.Delta(text=text, token_ids=token_ids, index=index))


class Peer(inference_pb2_grpc.InferenceServicer):
    """Answers every call with the next script: responses, and what ends it if not well."""

    def __init__(
        self, *scripts: tuple[Response | grpc.StatusCode | errors.ChiasmError, ...]
    ) -> None:
        self.scripts = deque(scripts)
        self.requests: list[inference_pb2.GenerateRequest] = []

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[inference_pb2.GenerateRequest, Response],
    ) -> AsyncIterator[Response]:
        self.requests.append(request)
        for step in self.scripts.popleft():
            if isinstance(step, grpc.StatusCode):
                await context.abort(step, "says a proxy")
            elif isinstance(step, errors.ChiasmError):
                raise step
            else:
                yield step


@contextlib.asynccontextmanager
async def answering(peer: Peer) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    inference_pb2_grpc.add_InferenceServicer_to_server(peer, server)
    async with listening(server) as address:
        yield address


async def ask_async(address: str, resume_timeout_s: float = 10.0, **kwargs: Any) -> list[Event]:
    async with AsyncClient(address, timeout_s=20, resume_timeout_s=resume_timeout_s) as client:
        return [event async for event in client.generate("x", **kwargs)]


async def ask_blocking(address: str, resume_timeout_s: float = 10.0, **kwargs: Any) -> list[Event]:
    def run() -> list[Event]:
        with Client(address, timeout_s=20, resume_timeout_s=resume_timeout_s) as client:
            return list(client.generate("x", **kwargs))

    return await asyncio.to_thread(run)


both = pytest.mark.parametrize("ask", [ask_async, ask_blocking])


def received(request: inference_pb2.GenerateRequest) -> list[list[int]]:
    return [list(each.token_ids) for each in request.received]


@both
async def test_the_rest_is_asked_for_behind_what_came(ask: Ask) -> None:
    peer = Peer(
        (STARTED, said(1, 2), said(3), LOST),
        (LOST,),
        (STARTED, said(4), LOST),
        (STARTED, said(5), LAST_TEXT, CHOICE, FINISHED),
    )
    async with answering(peer) as address:
        events = await ask(address, request_id="mine")
    kinds = [type(event) for event in events]
    assert kinds == [Started, *[Delta] * 5, ChoiceFinished, Finished]
    tokens = [i for event in events if isinstance(event, Delta) for i in event.token_ids]
    assert tokens == [1, 2, 3, 4, 5]
    assert [received(r) for r in peer.requests] == [[], *[[[1, 2, 3]]] * 2, [[1, 2, 3, 4]]]
    assert {r.request_id for r in peer.requests} == {"mine"}
    first, *others = peer.requests
    assert not first.sampling.HasField("seed")
    assert [r.sampling.seed for r in others] == [5] * 3


@both
async def test_what_has_no_token_ids_is_not_said_twice(ask: Ask) -> None:
    """The last text and the end of an answer come again, where they came before."""
    peer = Peer(
        (STARTED, said(1), LAST_TEXT, LOST),
        (STARTED, LAST_TEXT, CHOICE, LOST),
        (STARTED, LAST_TEXT, CHOICE, FINISHED),
    )
    async with answering(peer) as address:
        events = await ask(address)
    assert [type(event) for event in events] == [Started, Delta, Delta, ChoiceFinished, Finished]


@both
async def test_answers_are_told_apart(ask: Ask) -> None:
    peer = Peer((STARTED, said(9, index=2), said(7), LOST), (STARTED, FINISHED))
    async with answering(peer) as address:
        await ask(address, sampling=Sampling(n=3, temperature=1.0))
    assert received(peer.requests[1]) == [[7], [], [9]]


@both
@pytest.mark.parametrize(
    "end",
    [
        grpc.StatusCode.INTERNAL,
        errors.Unavailable("no decoder", reason="DECODER_UNAVAILABLE", retry_after_s=1.0),
        errors.Unavailable("says the gateway", retry_after_s=1.0),
        errors.DeadlineExceeded("too late"),
    ],
)
async def test_what_the_gateway_says_is_final(
    end: grpc.StatusCode | errors.ChiasmError, ask: Ask
) -> None:
    peer = Peer((STARTED, said(1), end))
    async with answering(peer) as address:
        with pytest.raises(errors.ChiasmError):
            await ask(address)
    assert len(peer.requests) == 1


@both
async def test_a_gateway_that_is_not_there_yet_is_asked_again(ask: Ask) -> None:
    peer = Peer(
        (STARTED, said(1), LOST),
        (errors.Unavailable("the model is being loaded", retry_after_s=1.0),),
        (errors.Unavailable("draining", reason=errors.DRAINING, retry_after_s=1.0),),
        (errors.AlreadyExists("in flight", reason="REQUEST_IN_FLIGHT", field="request_id"),),
        (errors.ResourceExhausted("full", reason="GATEWAY_FULL", retry_after_s=1.0),),
        (grpc.StatusCode.CANCELLED,),
        (STARTED, said(2), CHOICE, FINISHED),
    )
    async with answering(peer) as address:
        events = await ask(address)
    assert isinstance(events[-1], Finished)
    peer = Peer(
        (STARTED, said(1), LOST),
        (errors.Unavailable("no decoder", reason="DECODER_UNAVAILABLE", retry_after_s=1.0),),
    )
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable, match="no decoder"):
            await ask(address)


@both
async def test_an_answer_that_is_whole_is_not_asked_for_again(ask: Ask) -> None:
    peer = Peer((STARTED, said(1), CHOICE, FINISHED, LOST))
    async with answering(peer) as address:
        events = await ask(address)
    assert [type(event) for event in events] == [Started, Delta, ChoiceFinished, Finished]
    assert len(peer.requests) == 1


@both
async def test_a_request_without_tokens_is_told_from_a_new_one(ask: Ask) -> None:
    peer = Peer((STARTED, grpc.StatusCode.CANCELLED), (STARTED, said(1), CHOICE, FINISHED))
    async with answering(peer) as address:
        await ask(address)
    assert [received(r) for r in peer.requests] == [[], [[]]]


@both
async def test_gateways_that_cannot_go_on_with_a_stream(ask: Ask) -> None:
    """They tell no seed. One from before is not asked for a rest, and none is taken from it."""
    older = Response(started=inference_pb2.Started(request_id="r", model="m"))
    peer = Peer((older, said(1), LOST))
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable, match="says a proxy"):
            await ask(address)
    assert len(peer.requests) == 1
    peer = Peer((STARTED, said(1), LOST), (older, said(1), CHOICE, FINISHED))
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable, match="older"):
            await ask(address)


@both
async def test_a_request_that_brings_gateways_down_does_not_go_through_all(ask: Ask) -> None:
    peer = Peer((STARTED, said(1), LOST), *[(STARTED, LOST)] * 10)
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable, match="says a proxy"):
            await ask(address)
    assert len(peer.requests) == 1 + MAX_FRUITLESS


@both
async def test_looking_for_a_gateway_ends(ask: Ask) -> None:
    peer = Peer((STARTED, said(1), LOST), *[(LOST,)] * 1000)
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable):
            await ask(address, resume_timeout_s=0.5)
    assert 2 <= len(peer.requests) < 10
    peer = Peer((STARTED, said(1), LOST))
    async with answering(peer) as address:
        with pytest.raises(errors.Unavailable):
            await ask(address, resume_timeout_s=0)
    assert len(peer.requests) == 1


@both
async def test_nothing_goes_on_that_has_not_begun(ask: Ask) -> None:
    """Whether to ask anew is for the caller to say, and rows of the prompt would come twice."""
    for script in ((LOST,), (STARTED, PROMPT, LOST)):
        peer = Peer(script)
        async with answering(peer) as address:
            with pytest.raises(errors.Unavailable):
                await ask(address)
        assert len(peer.requests) == 1
    peer = Peer((STARTED, PROMPT, said(1), LOST), (STARTED, said(2), CHOICE, FINISHED))
    async with answering(peer) as address:
        events = await ask(address)
    assert sum(isinstance(event, PromptLogprobs) for event in events) == 1


async def test_a_caller_that_leaves_while_a_gateway_is_looked_for_leaves_nothing() -> None:
    peer = Peer((STARTED, said(1), LOST), *[(LOST,)] * 1000)
    async with answering(peer) as address, AsyncClient(address, timeout_s=20) as client:
        begun = asyncio.Event()

        async def stream() -> None:
            async for event in client.generate("x"):
                if isinstance(event, Delta):
                    begun.set()

        task = asyncio.create_task(stream())
        await asyncio.wait_for(begun.wait(), 10)
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        num_asked = len(peer.requests)
        await asyncio.sleep(5 * PAUSE_S)
        assert len(peer.requests) <= num_asked + 1  # which was on its way
