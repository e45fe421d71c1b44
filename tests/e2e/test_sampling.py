"""Sampling and the form of answers through the whole system, with transformers as the judge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import numpy as np
import pytest
import torch
from e2e import checkpoints
from e2e.reference import Reference

from chiasm import errors
from chiasm.client import (
    Client,
    Delta,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Result,
    Sampling,
    TokenLogprobs,
    user,
)
from chiasm.local import LocalStack, StackConfig
from chiasm.membership import Role
from chiasm.model.tokenizer import Tokenizer
from chiasm.v1 import decoder_pb2, decoder_pb2_grpc, inference_pb2

LOGPROBS_TOLERANCE = 1e-4
TIMEOUT_S = 60.0
NUM_TOKENS = 24
PROMPT = [user("Tell me of the dog, the car and the green umbrella. 你好")]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "green", None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "colour", "sizes", "ok"],
    "additionalProperties": False,
}
SCHEMA["properties"]["sizes"]["maxItems"] = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.hub(tmp_path_factory.mktemp("model"), 31)


@pytest.fixture(scope="module")
def stack(directory: Path) -> Iterator[LocalStack]:
    config = StackConfig(model=directory, dtype="float32", colocate=True)
    with LocalStack(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: LocalStack) -> Iterator[Client]:
    (gateway,) = stack.topology().ready(Role.GATEWAY)
    with Client(gateway.address, timeout_s=TIMEOUT_S) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return Reference.of(directory).model


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def ask(client: Client, **sampling: Any) -> Result:
    return client.complete(PROMPT, sampling=Sampling(**sampling))


def test_logprobs_are_the_reference_s_log_softmax(client: Client, model: Any) -> None:
    found = ask(client, max_tokens=24, temperature=0.9, seed=1, logprobs=5, prompt_logprobs=3)
    ids = torch.tensor([[*found.prompt_token_ids, *found.token_ids]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].float().log_softmax(-1).numpy()
    num_prompt = len(found.prompt_token_ids)
    assert len(found.prompt_logprobs) == num_prompt - 1
    assert_logprobs(found.prompt_logprobs, ids[0, 1:num_prompt].tolist(), expected, 3)
    assert_logprobs(found.logprobs, list(found.token_ids), expected[num_prompt - 1 :], 5)


def assert_logprobs(
    found: tuple[TokenLogprobs, ...], ids: list[int], expected: np.ndarray, count: int
) -> None:
    assert [entry.token.token_id for entry in found] == ids
    for entry, row in zip(found, expected, strict=False):
        assert len(entry.top) == count
        for token in (entry.token, *entry.top):
            assert abs(token.logprob - row[token.token_id]) <= LOGPROBS_TOLERANCE
        values = [token.logprob for token in entry.top]
        assert np.abs(np.sort(row)[::-1][:count] - values).max() <= LOGPROBS_TOLERANCE


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        (
            {"logit_bias": {40: 5.0, 60: 6.5, 2: -100.0}},
            {"sequence_bias": [[[40], 5.0], [[60], 6.5], [[2], -100.0]]},
        ),
    ],
)
def test_greedy_with_processors_is_that_of_transformers(
    ours: dict[str, Any], theirs: dict[str, Any], client: Client, model: Any
) -> None:
    found = ask(client, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **ours)
    ids = torch.tensor([found.prompt_token_ids])
    with torch.no_grad():
        expected = model.generate(
            input_ids=ids,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **theirs,
        )
    assert list(found.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_min_tokens_holds_the_end_back(client: Client) -> None:
    plain = ask(client, max_tokens=40, temperature=0, ignore_eos=True)
    stop = plain.token_ids[4]
    early = ask(client, max_tokens=40, temperature=0, stop_token_ids=[stop])
    assert early.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
    assert early.choices[0].stop == stop
    late = ask(client, max_tokens=40, temperature=0, stop_token_ids=[stop], min_tokens=20)
    assert stop not in late.token_ids[:20]
    assert len(late.token_ids) > 20


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(include: bool, client: Client) -> None:
    params: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = ask(client, **params).text
    stop = whole[20:27]
    sampling = Sampling(**params, stop=[stop], include_stop_str_in_output=include)
    shown = ""
    expected = whole[: whole.index(stop) + len(stop) * include]
    for event in client.generate(PROMPT, sampling=sampling):
        if isinstance(event, Delta):
            shown += event.text
            assert expected.startswith(shown)
    assert shown == expected
    found = client.complete(PROMPT, sampling=sampling)
    assert (found.finish_reason, found.choices[0].stop) == ("stop", stop)
    assert found.timings.decode_ns > 0
    assert found.timings.prefill_ns > 0


def test_seeds_and_several_answers(client: Client) -> None:
    params: dict[str, Any] = {"max_tokens": 16, "temperature": 1.2, "top_p": 0.95}
    single = [ask(client, seed=70 + i, **params).token_ids for i in range(3)]
    assert len(set(single)) == 3
    assert ask(client, seed=70, **params).token_ids == single[0]
    several = ask(client, seed=70, n=3, logprobs=0, **params)
    assert [choice.token_ids for choice in several.choices] == single
    assert all(len(c.logprobs) == len(c.token_ids) for c in several.choices)
    assert several.usage.completion_tokens == sum(map(len, single))
    assert ask(client, **params).token_ids != ask(client, **params).token_ids


def test_a_request_is_the_same_in_any_company(client: Client) -> None:
    base = Sampling(max_tokens=24, ignore_eos=True)
    batch = [
        replace(base, temperature=0),
        replace(base, temperature=0.8, seed=1, top_k=20),
        replace(base, temperature=1.1, seed=2, top_p=0.8, logprobs=2),
        replace(base, temperature=0.9, seed=3, min_p=0.05, frequency_penalty=0.5),
        replace(base, seed=4, repetition_penalty=1.2, presence_penalty=0.4),
        replace(base, seed=5, ignore_eos=False, response_format=Regex("[a-f ]{30,40}")),
    ]
    alone = [client.complete(PROMPT, sampling=sampling).token_ids for sampling in batch]
    with ThreadPoolExecutor(len(batch)) as pool:
        running = [pool.submit(client.complete, PROMPT, sampling=s) for s in batch]
        assert [answer.result().token_ids for answer in running] == alone


@pytest.mark.parametrize("seed", range(6))
def test_json_answers_are_valid(seed: int, client: Client) -> None:
    form = JsonSchema(SCHEMA)
    found = ask(client, max_tokens=600, temperature=1.3, seed=seed, response_format=form)
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.text), SCHEMA)


def test_json_object(client: Client) -> None:
    found = ask(client, max_tokens=300, seed=1, response_format=JsonObject(), logit_bias={95: 30.0})
    assert found.text.startswith("{")
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.text), dict)


@pytest.mark.parametrize("pattern", [r"[A-C]{3}-[0-9]{2,4}", r"(dog|red car) at [0-9]{2}:[0-9]{2}"])
def test_regex_answers_match(pattern: str, client: Client) -> None:
    for temperature in (0, 1.5):
        found = ask(client, max_tokens=60, temperature=temperature, response_format=Regex(pattern))
        assert found.finish_reason == "stop"
        assert re.fullmatch(pattern, found.text)


def test_choice_answers_are_choices(client: Client) -> None:
    texts = ["ja", 'nein, "nie"', "図\n", "jawohl"]
    for seed in range(4):
        found = ask(client, max_tokens=40, seed=seed, response_format=OneOf(texts), temperature=2)
        assert found.finish_reason == "stop"
        assert found.text in texts


@pytest.mark.parametrize("budget", [0, 1, 9])
def test_thinking_budget(budget: int, client: Client, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("</think>")
    found = client.complete(
        PROMPT,
        sampling=Sampling(max_tokens=30, temperature=0, thinking_budget=budget, ignore_eos=True),
        enable_thinking=True,
    )
    assert found.token_ids.index(end) == budget
    assert found.reasoning_text == tokenizer.decode(found.token_ids[:budget])
    assert found.text == tokenizer.decode(found.token_ids[budget + 1 :]).lstrip("\n")


def test_a_form_begins_after_the_thought(client: Client) -> None:
    found = client.complete(
        PROMPT,
        sampling=Sampling(
            max_tokens=600,
            temperature=1.2,
            seed=3,
            thinking_budget=12,
            response_format=JsonSchema(json.dumps(SCHEMA)),
            stop=["no such text"],
        ),
        enable_thinking=True,
    )
    assert found.reasoning_text
    jsonschema.validate(json.loads(found.text), SCHEMA)


def test_a_bad_form_is_named(client: Client) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        ask(client, response_format=JsonSchema({"type": "objekt"}))
    assert caught.value.field == "sampling.response_format.json_schema"


@pytest.mark.parametrize("num_done", [1, 7, 20, 32])
def test_a_decoder_goes_on_with_anothers_answer(
    num_done: int, client: Client, stack: LocalStack, tokenizer: Tokenizer
) -> None:
    params: dict[str, Any] = {
        "max_tokens": 32,
        "temperature": 0.9,
        "seed": 5,
        "top_p": 0.9,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.1,
        "min_tokens": 32,
        "thinking_budget": 10,
    }
    sampling = Sampling(**params)
    whole = client.complete(PROMPT, sampling=sampling, enable_thinking=True)
    assert len(whole.token_ids) == 32
    end = tokenizer.token_id("</think>")
    assert end is not None
    request = decoder_pb2.DecodeRequest(
        request_id="resumed",
        token_ids=[*whole.prompt_token_ids, *whole.token_ids[:num_done]],
        token_types=bytes(len(whole.prompt_token_ids)),
        sampling=inference_pb2.SamplingParams(**params),
        num_generated=num_done,
        think_end_ids=[end],
    )
    (decoder,) = stack.topology().ready(Role.DECODER)
    with grpc.insecure_channel(decoder.address) as channel:
        stub: Any = decoder_pb2_grpc.DecoderStub(channel)
        events = list(stub.Decode(request, timeout=TIMEOUT_S))
    rest = [token_id for event in events for token_id in event.tokens.token_ids]
    assert rest == list(whole.token_ids[num_done:])
    assert events[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH
