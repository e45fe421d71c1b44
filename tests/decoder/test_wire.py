"""What the decoder refuses: nothing that could end a step for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.services.decoder import wire
from chiasm.services.decoder.grammars import MAX_GRAMMAR_BYTES
from chiasm.services.decoder.sequence import Sampling
from chiasm.services.decoder.servicer import PROMPT_ROWS_BYTES, DecoderServicer
from chiasm.v1 import decoder_pb2, inference_pb2

LIMIT, SIZE = 4096, 576


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(tiny_checkpoint)


def request(sampling: dict[str, Any] | None = None, **fields: Any) -> decoder_pb2.DecodeRequest:
    values = {"token_ids": [5, 6, 7], "token_types": bytes(3), **fields}
    params = inference_pb2.SamplingParams(**(sampling or {}))
    return decoder_pb2.DecodeRequest(sampling=params, **values)


def test_every_wish_reaches_the_sampler(config: ModelConfig) -> None:
    wanted: dict[str, Any] = {
        "max_tokens": 11,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 12,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.75,
        "frequency_penalty": -0.5,
        "seed": 13,
        "min_tokens": 4,
        "logprobs": 3,
        "prompt_logprobs": 0,
        "thinking_budget": 0,
    }
    given = request(
        {**wanted, "logit_bias": {9: 2.0, 8: -1.0}, "stop_token_ids": [70]}, think_end_ids=[71, 72]
    )
    found = wire.sampling(given, config, capacity=LIMIT)
    assert found == Sampling(
        **wanted,
        logit_bias=((8, -1.0), (9, 2.0)),
        stop_token_ids=frozenset((70, *config.tokens.eos)),
        think_end_ids=(71, 72),
    )
    given.sampling.ignore_eos = True
    assert wire.sampling(given, config, capacity=LIMIT).stop_token_ids == {70}


def test_what_is_not_wished_for_changes_nothing(config: ModelConfig) -> None:
    made = request(token_ids=[5, 6, 7, 8], num_generated=1)
    found = wire.sampling(made, config, capacity=100)
    eos = frozenset(config.tokens.eos)
    assert found == Sampling(max_tokens=97, seed=found.seed, stop_token_ids=eos)
    assert found.seed != wire.sampling(made, config, capacity=100).seed
    greedy = wire.sampling(request({"temperature": 0, "seed": 0}), config, capacity=100)
    assert (greedy.temperature, greedy.seed) == (0, 0)


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (request(token_ids=[], token_types=b""), "token_ids"),
        (request(token_ids=[5, SIZE, 7]), "token_ids"),
        (request(token_ids=[5] * LIMIT, token_types=bytes(LIMIT)), "token_ids"),
        (request(token_ids=[5] * (LIMIT + 1), num_generated=LIMIT - 2), "token_ids"),
        (request(num_generated=3, token_types=b""), "token_ids"),
        (request(num_generated=7), "token_ids"),
        (request(num_generated=1), "token_types"),
        (request(token_types=b"\0\0\3"), "token_types"),
        (request(think_end_ids=[SIZE]), "think_end_ids"),
        (request(grammar="g" * (MAX_GRAMMAR_BYTES + 1)), "grammar"),
        (request({"stop_token_ids": [5, SIZE]}), "sampling.stop_token_ids"),
        (request({"logit_bias": {SIZE: 1.0}}), "sampling.logit_bias"),
        (request({"max_tokens": LIMIT - 2}), "sampling.max_tokens"),
        (request({"temperature": float("nan")}), "sampling.temperature"),
        (request({"temperature": -1}), "sampling.temperature"),
        (request({"repetition_penalty": 0}), "sampling.repetition_penalty"),
        (request({"repetition_penalty": float("nan")}), "sampling.repetition_penalty"),
        (request({"top_p": 0}), "sampling.top_p"),
        (request({"top_p": 1.1}), "sampling.top_p"),
        (request({"min_p": 1.1}), "sampling.min_p"),
        (request({"min_p": float("nan")}), "sampling.min_p"),
    ],
)
def test_bad_requests(made: decoder_pb2.DecodeRequest, field: str, config: ModelConfig) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        wire.check(made, config)
    assert caught.value.field == field


def test_defaults(config: ModelConfig) -> None:
    made = request(token_types=bytes(2), num_generated=1)
    wire.check(made, config)
    sampling = wire.sampling(made, config, capacity=1 << 20)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1, 1, 1)
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.thinking_budget) == (None,) * 3
    assert sampling.stop_token_ids == frozenset(config.tokens.eos)
    assert sampling.max_tokens == LIMIT - 2  # counts what was generated elsewhere
    endless = wire.sampling(request({"ignore_eos": True}), config, capacity=64)
    assert endless.stop_token_ids == frozenset()


@pytest.mark.parametrize(("capacity", "expected"), [(64, 61), (4, 1), (2, 1), (1 << 20, LIMIT - 3)])
def test_an_answer_without_a_limit_is_as_long_as_fits(
    capacity: int, expected: int, config: ModelConfig
) -> None:
    """The cache may be smaller than the context; one that cannot hold the prompt refuses it."""
    made = request()
    assert len(made.token_ids) == 3
    assert wire.sampling(made, config, capacity=capacity).max_tokens == expected
    limited = request({"max_tokens": 7})
    assert wire.sampling(limited, config, capacity=capacity).max_tokens == 7


def test_prompt_rows_are_booked_before_they_are_computed(config: ModelConfig) -> None:
    """Callers who do not read cannot make a decoder hold more than its share of them."""
    plain, rows = request(), request(prompt_logits=True)
    assert wire.prompt_rows_bytes(plain, config) == 0
    assert wire.prompt_rows_bytes(rows, config) == 3 * SIZE * 4
    listed = request({"prompt_logprobs": 0})
    assert 0 < wire.prompt_rows_bytes(listed, config) < wire.prompt_rows_bytes(rows, config)
    servicer = DecoderServicer(config, embeddings=Mock(), grammars=Mock())
    servicer._reserve(3 * PROMPT_ROWS_BYTES)  # alone it may have more
    servicer._reserve(0)
    with pytest.raises(errors.ResourceExhausted) as caught:
        servicer._reserve(1)
    assert caught.value.retry_after_s
