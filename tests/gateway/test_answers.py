"""Answers through the gateway: stop strings, thoughts, several at once, log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import FakeDecoder, Stack, finished_event, tokens_event

from chiasm import errors
from chiasm.client import (
    AsyncClient,
    ChoiceFinished,
    Delta,
    Finished,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Sampling,
    Tokens,
)
from chiasm.services.gateway.merging import merged
from chiasm.services.gateway.thinking import always_thinks
from chiasm.v1 import decoder_pb2, inference_pb2

DecodeEvents = AsyncIterator[decoder_pb2.DecodeEvent]
SENTENCE = "The answer is yes. 图片里有一只狗。"


async def collect(client: AsyncClient, prompt: Any = "x", **kwargs: Any) -> list[Any]:
    return [event async for event in client.generate(prompt, **kwargs)]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["wer is", "e", "片里", "T", "狗。"])
async def test_stop_string(
    stop: str, include: bool, stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    cancelled = asyncio.Event()

    async def script(request: decoder_pb2.DecodeRequest) -> DecodeEvents:
        assert not request.sampling.stop
        try:
            for token_id in [*stack.tokenizer.encode(SENTENCE), *stack.tokenizer.encode("More")]:
                yield tokens_event(token_id)
                await asyncio.sleep(0.005)
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    decoder.scripts.append(script)
    sampling = Sampling(stop=["no such", stop], include_stop_str_in_output=include)
    events = await collect(client, sampling=sampling)
    deltas = [event for event in events if isinstance(event, Delta)]
    expected = SENTENCE[: SENTENCE.index(stop) + len(stop) * include]
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert expected.startswith(shown)
    assert shown == expected
    choice, finished = events[-2:]
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert choice == ChoiceFinished(index=0, reason="stop", stop=stop, completion_tokens=len(ids))
    assert stack.tokenizer.decode(ids).startswith(SENTENCE[: SENTENCE.index(stop) + len(stop)])
    assert (finished.reason, finished.usage.completion_tokens) == ("stop", len(ids))
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_stop_string_in_the_last_text(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    """The end of the answer is held back as a possible stop string, then shown."""
    decoder.token_ids = stack.tokenizer.encode("yes no")
    result = await client.complete("x", sampling=Sampling(stop=["no!"]))
    assert (result.text, result.choices[0].stop) == ("yes no", None)


async def test_min_tokens_exempts_stop_strings(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = stack.tokenizer.encode("a b a b a b")
    first = len(stack.tokenizer.encode("a b a b"))
    sampling = Sampling(stop=["b"], min_tokens=first)
    result = await client.complete("x", sampling=sampling)
    assert result.text == "a b a b a "
    assert decoder.requests[0].sampling.min_tokens == first


async def test_min_tokens_exempts_the_last_text_too(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    """What is held back as an unfinished character comes with no token of its own."""
    decoder.token_ids = stack.tokenizer.encode("🙂")[:2]
    sampling = Sampling(stop=["\N{REPLACEMENT CHARACTER}"], min_tokens=2)
    result = await client.complete("x", sampling=sampling)
    assert (result.text, result.choices[0].stop) == ("\N{REPLACEMENT CHARACTER}", None)


async def test_stop_token_is_named_and_shown_on_demand(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = stack.tokenizer.encode("The answer")
    stop = decoder.token_ids[-1]
    for include in (False, True):
        sampling = Sampling(stop_token_ids=[stop], include_stop_str_in_output=include)
        result = await client.complete("x", sampling=sampling)
        shown = decoder.token_ids if include else decoder.token_ids[:-1]
        assert result.text == stack.tokenizer.decode(shown)
        assert result.choices[0].stop == stop


async def test_thought_is_kept_apart(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    end = stack.tokenizer.token_id("</think>")
    assert end is not None
    thought = stack.tokenizer.encode("图 hm yes")
    # The thought breaks off within a character; the answer's characters are its own.
    decoder.token_ids = [*thought, *stack.tokenizer.encode("🙂")[:2], end]
    decoder.token_ids += stack.tokenizer.encode("🙂 no yes")
    sampling = Sampling(stop=["yes"], thinking_budget=9)
    result = await client.complete("x", sampling=sampling, enable_thinking=True)
    assert result.reasoning_text.startswith("图 hm yes")
    assert result.text == "🙂 no "
    assert list(result.token_ids) == decoder.token_ids[: len(result.token_ids)]
    assert list(decoder.requests[0].think_end_ids) == [end]
    assert decoder.requests[0].sampling.thinking_budget == 9


@pytest.mark.parametrize("blank", ["\n", "\n\n", "\n" * 5])
async def test_blank_lines_after_a_thought_are_not_the_answers(
    blank: str, stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    end = stack.tokenizer.token_id("</think>")
    assert end is not None
    answer = stack.tokenizer.encode(f"{blank}one\n\ntwo")
    decoder.token_ids = [*stack.tokenizer.encode("hm"), end, *answer]
    result = await client.complete("x", enable_thinking=True)
    assert (result.reasoning_text, result.text) == ("hm", "one\n\ntwo")
    stopped = await client.complete("x", sampling=Sampling(stop="\n\n"), enable_thinking=True)
    assert stopped.text == "one"
    formed = Sampling(response_format=Regex(r"\n+one\n\ntwo"))
    result = await client.complete("x", sampling=formed, enable_thinking=True)
    assert result.text == f"{blank}one\n\ntwo"


async def test_a_stop_token_within_a_thought_is_no_text(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = stack.tokenizer.encode("hm yes")
    sampling = Sampling(stop_token_ids=[decoder.token_ids[-1]])
    result = await client.complete("x", sampling=sampling, enable_thinking=True)
    assert result.reasoning_text == stack.tokenizer.decode(decoder.token_ids[:-1])
    assert result.choices[0].stop == decoder.token_ids[-1]


async def test_thought_without_end(stack: Stack, decoder: FakeDecoder, client: AsyncClient) -> None:
    decoder.token_ids = stack.tokenizer.encode("hm 图")[:-1]
    result = await client.complete("x", enable_thinking=True)
    assert result.text == ""
    assert result.reasoning_text == stack.tokenizer.decode(decoder.token_ids)


async def test_without_thinking_there_is_no_thought(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    result = await client.complete("x")
    assert (result.reasoning_text, list(decoder.requests[0].think_end_ids)) == ("", [])


async def test_a_tokenised_prompt_may_open_a_thought(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    start, end = (stack.tokenizer.token_id(t) for t in ("<think>", "</think>"))
    assert start is not None
    assert end is not None
    for prompt, is_open in (([9, start, 9], True), ([9, start, 9, end], False)):
        result = await client.complete(Tokens(token_ids=prompt))
        assert bool(result.reasoning_text) is is_open


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{- '<think>' -}}", True),
        ("{{- '<think>' -}}{% if not enable_thinking %}</think>{% endif %}", False),
        ("{{ messages }}", False),
        (None, False),
    ],
)
def test_models_that_always_think(template: str | None, expected: bool, tmp_path: Path) -> None:
    assert not always_thinks(tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    assert always_thinks(tmp_path) is expected


async def test_several_answers(stack: Stack, decoder: FakeDecoder, client: AsyncClient) -> None:
    """The first one is alone until its first token; all are told apart by index and seed."""
    first_may_go_on = asyncio.Event()

    async def script(request: decoder_pb2.DecodeRequest) -> DecodeEvents:
        index = (request.sampling.seed + 1) % 2**64
        if index == 0:
            await asyncio.sleep(0.05)
            assert len(decoder.requests) == 1
            yield tokens_event(10)
            await first_may_go_on.wait()
        for token_id in stack.tokenizer.encode(f"answer {index}"):
            yield tokens_event(token_id)
        if index == 2:
            first_may_go_on.set()
        yield finished_event(
            inference_pb2.FINISH_REASON_LENGTH if index == 1 else inference_pb2.FINISH_REASON_STOP
        )

    decoder.scripts.extend([script] * 3)
    sampling = Sampling(n=3, seed=2**64 - 1, prompt_logprobs=0)
    events = await collect(client, sampling=sampling, request_id="several")
    texts = ["", "", ""]
    for event in events:
        if isinstance(event, Delta):
            texts[event.index] += event.text
    assert texts == [stack.tokenizer.decode([10]) + "answer 0", "answer 1", "answer 2"]
    ends = {e.index: e.reason for e in events if isinstance(e, ChoiceFinished)}
    assert ends == {0: "stop", 1: "length", 2: "stop"}
    assert isinstance(events[-1], Finished)
    num_tokens = sum(e.completion_tokens for e in events if isinstance(e, ChoiceFinished))
    assert events[-1].usage.completion_tokens == num_tokens
    assert events[-1].reason == "stop"
    assert len({request.request_id for request in decoder.requests}) == 3
    asked = [request.sampling.HasField("prompt_logprobs") for request in decoder.requests]
    assert asked == [True, False, False]


async def test_several_answers_share_a_decoder(stack: Stack, client: AsyncClient) -> None:
    """Where the first one is; when that decoder goes away, all of them meet at another one."""
    decoders = [await stack.add_decoder() for _ in range(3)]

    async def lost(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(9)
        raise errors.Unavailable("gone")

    home = min(decoders, key=lambda decoder: decoder.address)
    home.scripts.extend([lost] * 2)
    result = await client.complete("x", sampling=Sampling(n=4, temperature=1))
    assert sorted(len(choice.token_ids) for choice in result.choices) == [3, 3, 4, 4]
    others = sorted(len(d.requests) for d in decoders if d is not home)
    assert others[0] == 0
    assert len(home.requests) + others[1] == 6
    await client.complete("x", sampling=Sampling(n=4, temperature=1))
    assert sorted(len(d.requests) for d in decoders if d is not home) == others


async def test_one_failed_answer_ends_all(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    async def going(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        while True:
            yield tokens_event(10)
            await asyncio.sleep(0.01)

    async def failing(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(10)
        raise errors.Internal("broken")

    decoder.scripts.extend([going, failing])
    with pytest.raises(errors.Internal):
        await client.complete("x", sampling=Sampling(n=2), request_id="fails")
    await asyncio.wait_for(decoder.cancelled.wait(), 5)


async def test_seed_is_the_gateways_choice(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    """So that a decoder that takes over draws the same numbers."""
    for _ in range(2):
        await client.complete("x")
    seeds = [request.sampling.seed for request in decoder.requests]
    assert all(request.sampling.HasField("seed") for request in decoder.requests)
    assert seeds[0] != seeds[1]


async def test_every_parameter_arrives(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    sampling = Sampling(
        temperature=0.5,
        top_p=0.75,
        top_k=9,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        logit_bias={7: -100.0, 9: 2.5},
        seed=3,
        stop_token_ids=[44],
        min_tokens=2,
        max_tokens=17,
        logprobs=0,
        prompt_logprobs=20,
        thinking_budget=0,
        ignore_eos=True,
    )
    await client.complete("x", sampling=sampling)
    sent = decoder.requests[0].sampling
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        assert getattr(sent, name) == getattr(sampling, name)
    for name in ("presence_penalty", "frequency_penalty", "min_tokens", "max_tokens", "ignore_eos"):
        assert getattr(sent, name) == getattr(sampling, name)
    for name in ("logprobs", "prompt_logprobs", "thinking_budget"):
        assert sent.HasField(name)
        assert getattr(sent, name) == getattr(sampling, name)
    assert dict(sent.logit_bias) == sampling.logit_bias
    assert list(sent.stop_token_ids) == [44]
    assert not decoder.requests[0].grammar


@pytest.mark.parametrize(
    "form",
    [
        JsonSchema({"type": "object"}),
        JsonSchema('{"type": "object"}'),
        JsonObject(),
        Regex("a+"),
        OneOf(["ü", '"']),
    ],
)
async def test_response_format_becomes_a_grammar(
    form: Any, stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    await client.complete("x", sampling=Sampling(response_format=form))
    assert decoder.requests[0].grammar
    assert not decoder.requests[0].sampling.HasField("response_format")


async def test_logprobs_pass_through(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    def entry(token_id: int) -> inference_pb2.TokenLogprobs:
        token = inference_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)
        return inference_pb2.TokenLogprobs(token=token, top=[token])

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        for offset, ids in ((1, [6, 7]), (3, [8])):
            prompt = inference_pb2.PromptLogprobs(offset=offset, tokens=map(entry, ids))
            yield decoder_pb2.DecodeEvent(prompt_logprobs=prompt)
        for ids in ([10, 11], [12]):
            tokens = decoder_pb2.DecodedTokens(token_ids=ids, logprobs=map(entry, ids))
            yield decoder_pb2.DecodeEvent(tokens=tokens)
        yield finished_event()

    decoder.scripts.append(script)
    result = await client.complete("x", sampling=Sampling(logprobs=1, prompt_logprobs=1))
    assert [e.token.token_id for e in result.logprobs] == [10, 11, 12]
    assert [e.token.token_id for e in result.prompt_logprobs] == [6, 7, 8]
    assert result.logprobs[0].top[0].logprob == -0.5


async def test_merged_streams_are_closed_with_the_reader() -> None:
    closed = []

    async def numbers(name: int) -> Any:
        try:
            for i in range(100):
                yield name, i
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    stream = merged([numbers(0), numbers(1), numbers(2)], lambda item: item == (0, 3))
    seen = [await anext(stream) for _ in range(30)]
    assert seen[:4] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    for name in range(3):
        of_one = [i for n, i in seen if n == name]
        assert of_one == list(range(len(of_one)))
        assert of_one
    await stream.aclose()
    assert sorted(closed) == [0, 1, 2]
    assert len(asyncio.all_tasks()) == 1
