"""What a client has of an answer already is not said again: the gateway goes on behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from gateway.harness import FakeDecoder, Script, Stack, finished_event, tokens_event

from chiasm import errors
from chiasm.client import Sampling, codec
from chiasm.transport import status
from chiasm.v1 import decoder_pb2, inference_pb2, inference_pb2_grpc

Stub = inference_pb2_grpc.InferenceStub
SENTENCE = "The answer 🙂 is yes. 图片里有一只狗。"


def saying(token_ids: Sequence[int]) -> Script:
    """A decoder that goes on behind what was generated before, one token at a time."""

    async def script(
        request: decoder_pb2.DecodeRequest,
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        for token_id in token_ids[request.num_generated :]:
            yield tokens_event(token_id)
        yield finished_event()

    return script


def asking(
    *received: Sequence[int], thinks: bool = False, **sampling: Any
) -> inference_pb2.GenerateRequest:
    options = codec.Options(sampling=Sampling(**{"seed": 7, **sampling}), enable_thinking=thinks)
    request = codec.generate_request("x", options, request_id="")
    for token_ids in received:
        request.received.add(token_ids=token_ids)
    return request


async def stream(
    stub: Stub, request: inference_pb2.GenerateRequest
) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in stub.Generate(request, timeout=20)]


def deltas(responses: Sequence[inference_pb2.GenerateResponse]) -> list[inference_pb2.Delta]:
    return [response.delta for response in responses if response.HasField("delta")]


def texts(responses: Sequence[inference_pb2.GenerateResponse]) -> tuple[str, str]:
    """Thought and answer."""
    found = deltas(responses)
    return "".join(d.reasoning_text for d in found), "".join(d.text for d in found)


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        (SENTENCE, {}),
        (SENTENCE, {"stop": ["片里"]}),
        (SENTENCE, {"stop": ["no such", "狗。"], "include_stop_str_in_output": True}),
        (SENTENCE, {"stop": ["。!"]}),
        ("e e e e", {"stop": ["e"], "min_tokens": 3}),
        (f"hm 🙂 {{end}}\n\n{SENTENCE}", {"thinks": True, "stop": ["狗"]}),
    ],
)
async def test_an_answer_goes_on_behind_any_of_its_tokens(
    text: str, sampling: dict[str, Any], stack: Stack, decoder: FakeDecoder, stub: Stub
) -> None:
    end = stack.tokenizer.token_id("</think>")
    assert end is not None
    thought, _, answer = text.rpartition("{end}")
    token_ids = [*stack.tokenizer.encode(thought), *([end] if thought else [])]
    token_ids += stack.tokenizer.encode(answer)
    decoder.scripts.append(saying(token_ids))
    whole = await stream(stub, asking(**sampling))
    pieces = [d for d in deltas(whole) if d.token_ids]
    given = [d.token_ids[0] for d in pieces]
    for num_received in range(len(given) + 1):
        decoder.scripts.append(saying(token_ids))
        rest = await stream(stub, asking(given[:num_received], **sampling))
        had = pieces[:num_received]
        assert [i for d in deltas(rest) for i in d.token_ids] == given[num_received:]
        thinking, said = texts(rest)
        assert ("".join(d.reasoning_text for d in had) + thinking) == texts(whole)[0]
        assert ("".join(d.text for d in had) + said) == texts(whole)[1]
        assert rest[-2].choice_finished == whole[-2].choice_finished
        assert rest[-1].finished.usage == whole[-1].finished.usage
        assert rest[0].started.seed == whole[0].started.seed == 7
        request = decoder.requests[-1]
        if decoder.scripts:
            # The last token completed a stop string: nobody had to be asked.
            assert num_received == len(given)
            assert rest[-2].choice_finished.stop_str
            decoder.scripts.clear()
        else:
            assert request.num_generated == num_received
            assert list(request.token_ids[len(request.token_types) :]) == given[:num_received]


async def test_each_of_several_answers_goes_on_by_itself(
    stack: Stack, decoder: FakeDecoder, stub: Stub
) -> None:
    """One is complete, one under way, one has not begun."""
    answers = {7: "one stop", 8: "two three", 9: "four"}
    ids = {seed: stack.tokenizer.encode(text) for seed, text in answers.items()}

    async def script(
        request: decoder_pb2.DecodeRequest,
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        async for event in saying(ids[request.sampling.seed])(request):
            yield event

    decoder.scripts.extend([script] * 3)
    asked = asking(ids[7], ids[8][:1], n=3, temperature=1.0, stop=["stop"])
    rest = await stream(stub, asked)
    by_answer = {i: [d for d in deltas(rest) if d.index == i] for i in range(3)}
    assert not by_answer[0]
    assert [i for d in by_answer[1] for i in d.token_ids] == ids[8][1:]
    assert "".join(d.text for d in by_answer[2]) == "four"
    ends = {
        r.choice_finished.index: r.choice_finished for r in rest if r.HasField("choice_finished")
    }
    assert {i: end.stop_str for i, end in ends.items()} == {0: "stop", 1: "", 2: ""}
    assert rest[-1].finished.usage.completion_tokens == sum(map(len, ids.values()))
    assert sorted(r.sampling.seed for r in decoder.requests) == [8, 9]


async def test_answers_left_begin_one_after_the_other(
    stack: Stack, decoder: FakeDecoder, stub: Stub
) -> None:
    """The first of them computes the prompt for the others."""
    num_asked = []

    async def slow(
        request: decoder_pb2.DecodeRequest,
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        await asyncio.sleep(0.2)
        num_asked.append(len(decoder.requests))
        yield tokens_event(10)
        yield finished_event()

    decoder.scripts.extend([slow, saying([11]), saying([12])])
    whole = stack.tokenizer.encode("stop")
    await stream(stub, asking(whole, n=4, temperature=1.0, stop=["stop"]))
    assert num_asked == [1]


async def test_a_decoder_that_has_not_noticed_the_loss_is_asked_again(
    decoder: FakeDecoder, stub: Stub
) -> None:
    """Also for an answer of which nothing has come yet."""

    async def in_flight(
        request: decoder_pb2.DecodeRequest,
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        raise errors.AlreadyExists("in flight", reason="REQUEST_IN_FLIGHT", field="request_id")
        yield

    for received in ([], [10]):
        decoder.scripts.extend([in_flight, saying([10, 11])])
        rest = await stream(stub, asking(received))
        assert [i for d in deltas(rest) for i in d.token_ids] == [10, 11][len(received) :]
    decoder.scripts.append(in_flight)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(stub, asking())
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_the_chosen_seed_is_told_and_taken_back(decoder: FakeDecoder, stub: Stub) -> None:
    first = asking()
    first.sampling.ClearField("seed")
    seeds = [(await stream(stub, first))[0].started.seed for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert [r.sampling.seed for r in decoder.requests] == seeds
    await stream(stub, asking([10], seed=seeds[0]))
    assert decoder.requests[-1].sampling.seed == seeds[0]


@pytest.mark.parametrize(
    ("received", "sampling", "field"),
    [
        ([[10], [11]], {}, "received"),
        ([[10]], {"seed": None}, "sampling.seed"),
        ([[10] * 5], {"max_tokens": 4}, "received[0].token_ids"),
        ([[], [10, 1 << 31]], {"n": 2}, "received[1].token_ids[1]"),
        ([[10] * 100_000], {}, "received[0].token_ids"),
    ],
)
async def test_what_no_client_can_have_received_is_refused(
    received: list[list[int]],
    sampling: dict[str, Any],
    field: str,
    decoder: FakeDecoder,
    stub: Stub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(stub, asking(*received, temperature=1.0, **sampling))
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == field
    assert not decoder.requests


async def test_tokens_behind_the_end_are_refused(
    stack: Stack, decoder: FakeDecoder, stub: Stub
) -> None:
    token_ids = stack.tokenizer.encode("yes no")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(stub, asking(token_ids, stop=["y"]))
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == "received[0].token_ids"
    assert not decoder.requests
