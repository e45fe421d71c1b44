"""What changes logits before the draw, and that its state follows from the tokens alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder.sequences import sequence
from llguidance import LLMatcher
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.decoder.grammars import Grammars
from chiasm.services.decoder.processors import Processors
from chiasm.services.decoder.sampler import choose
from chiasm.services.decoder.sequence import Sequence

SIZE = 576
EOS = frozenset({2, 513})
"""What the tiny checkpoint ends an answer with."""


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    config = ModelConfig.load(tiny_checkpoint)
    assert config.text.vocab_size == SIZE
    assert frozenset(config.tokens.eos) == EOS
    return config


@pytest.fixture(scope="module")
def grammars(tiny_checkpoint: Path, config: ModelConfig) -> Grammars:
    return Grammars(tiny_checkpoint, config)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint)


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def processed(owner: Sequence, row: torch.Tensor) -> torch.Tensor:
    processors = Processors(owner, SIZE, torch.device("cpu"))
    processors.catch_up(owner)
    row = row.clone()
    processors.apply(row)
    return row


def run(owner: Sequence, num_steps: int, seed: int) -> list[int]:
    """Generates with logits that depend on the place alone; stops where the engine would."""
    while owner.num_generated < num_steps:
        row = logits(seed + owner.num_generated)
        choice = choose(row[None], [owner])[0]
        assert choice.error is None
        owner.token_ids.append(choice.token_id)
        if choice.token_id in owner.sampling.stop_token_ids:
            break
    return owner.token_ids[owner.num_prompt :]


@pytest.mark.parametrize("penalty", [0.7, 1.0001, 1.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, answer, row = [5, 6, 6, 200], [9, 5], logits(1)
    ids = torch.tensor([prompt + answer])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None].clone())[0]
    found = processed(sequence(prompt, answer, repetition_penalty=penalty), row)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.7), (-1.5, 2.0)])
def test_presence_and_frequency_count_the_answer_alone(presence: float, frequency: float) -> None:
    answer, row = [9, 5, 9, 9, 300], logits(2)
    expected = row.clone()
    for token_id, count in Counter(answer).items():
        expected[token_id] -= frequency * count + presence
    owner = sequence([5, 77], answer, presence_penalty=presence, frequency_penalty=frequency)
    torch.testing.assert_close(processed(owner, row), expected)


def test_logit_bias_is_that_of_transformers() -> None:
    bias, row = {5: 1.5, 9: -100.0, 575: 3.0}, logits(3)
    judge = SequenceBiasLogitsProcessor([[[i], value] for i, value in bias.items()])
    expected = judge(torch.tensor([[1]]), row[None].clone())[0]
    torch.testing.assert_close(processed(sequence(logit_bias=tuple(bias.items())), row), expected)


@pytest.mark.parametrize("num_generated", [0, 2, 3, 4])
def test_min_tokens_is_that_of_transformers(num_generated: int) -> None:
    prompt, answer, row = [1, 7], [9] * num_generated, logits(4)
    judge = MinNewTokensLengthLogitsProcessor(len(prompt), 3, [*EOS, 17], device="cpu")
    expected = judge(torch.tensor([prompt + answer]), row[None].clone())[0]
    owner = sequence(prompt, answer, min_tokens=3, stop_token_ids=EOS | {17})
    torch.testing.assert_close(processed(owner, row), expected)


def test_order_is_bias_then_penalties() -> None:
    row = torch.zeros(SIZE)
    owner = sequence([5], [5], logit_bias=((5, 4.0),), repetition_penalty=2.0, presence_penalty=1.0)
    assert processed(owner, row)[5] == 4.0 / 2 - 1


def test_a_thought_ends_with_its_budget() -> None:
    params: dict[str, Any] = {"think_end_ids": (40, 41), "thinking_budget": 5, "temperature": 1.0}
    found = run(sequence(**params, logit_bias=((41, -100.0),)), 20, seed=50)
    assert found[5:7] == [40, 41]
    assert 41 not in found[:5] + found[7:]
    assert run(sequence(**{**params, "thinking_budget": 0}), 3, seed=50)[:2] == [40, 41]


def test_a_thought_that_ended_by_itself_is_not_ended_again() -> None:
    owner = sequence([1], [9, 41, 9], think_end_ids=(40, 41), thinking_budget=2)
    assert torch.equal(processed(owner, logits(6)), logits(6))


def test_a_thought_that_has_outgrown_its_budget_ends_at_once() -> None:
    """As when it comes from a decoder that knew of no budget."""
    owner = sequence([1], [9] * 7, think_end_ids=(40, 41), thinking_budget=2)
    assert int(processed(owner, logits(6)).argmax()) == 41


def test_a_thought_may_end_with_a_token_that_stops_an_answer(grammars: Grammars) -> None:
    matcher = grammars.matcher(LLMatcher.grammar_from_regex("yes|no"))
    owner = sequence(matcher=matcher, stop_token_ids=EOS | {40}, think_end_ids=(40,))
    row = processed(owner, logits(6))
    assert row[40].isfinite()
    assert not row[[*EOS]].isfinite().any()


def test_without_a_thought_the_budget_has_no_effect() -> None:
    assert torch.equal(processed(sequence(thinking_budget=0), logits(6)), logits(6))


SCHEMA = (
    '{"type": "object", "properties": {"colour": {"enum": ["red", "green"]}, '
    '"size": {"type": "integer", "minimum": 1, "maximum": 999}}, '
    '"required": ["colour", "size"], "additionalProperties": false}'
)


@pytest.mark.parametrize("seed", range(5))
def test_answers_match_their_grammar(seed: int, grammars: Grammars, tokenizer: Tokenizer) -> None:
    pattern = r"(ab|c){2,5}: \d{3}"
    matcher = grammars.matcher(LLMatcher.grammar_from_regex(pattern))
    owner = sequence(matcher=matcher, stop_token_ids=EOS, seed=seed)
    ids = run(owner, 60, seed=1000 * seed)
    assert ids[-1] in EOS
    assert re.fullmatch(pattern, tokenizer.decode(ids))


def test_a_grammar_begins_after_the_thought(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher(LLMatcher.grammar_from_regex("yes|no"))
    owner = sequence(
        matcher=matcher,
        stop_token_ids=EOS,
        think_end_ids=(40,),
        thinking_budget=6,
        logit_bias=((40, -100.0), (2, 20.0)),
        temperature=0.5,
    )
    ids = run(owner, 60, seed=9)
    assert ids[6] == 40
    assert not EOS & set(ids[:6])  # a thought alone is no answer
    assert tokenizer.decode(ids[7:]) in ("yes", "no")


@pytest.mark.parametrize("num_done", [0, 1, 7, 15])
@pytest.mark.parametrize("seed", range(2))
def test_a_resumed_sequence_goes_on_undisturbed(
    num_done: int, seed: int, grammars: Grammars
) -> None:
    params: dict[str, Any] = {
        "matcher": grammars.matcher(LLMatcher.grammar_from_json_schema(SCHEMA)),
        "stop_token_ids": EOS,
        "think_end_ids": (40,),
        "thinking_budget": 5,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "top_p": 0.9,
        "seed": seed,
    }
    whole = run(sequence([5, 6], **params), 40, seed=seed)
    assert len(whole) > num_done
    resumed = sequence([5, 6], whole[:num_done], **params)
    assert run(resumed, 40, seed=seed) == whole


def test_choosing_again_changes_nothing(grammars: Grammars) -> None:
    """A step that failed after the sampler is repeated."""
    matcher = grammars.matcher(LLMatcher.grammar_from_json_schema(SCHEMA))
    owner = sequence(matcher=matcher, frequency_penalty=1.0)
    for step in range(8):
        row = logits(step)[None]
        first = choose(row, [owner])
        assert choose(row, [owner]) == first
        owner.token_ids.append(first[0].token_id)


def test_a_grammar_that_refuses_fails_its_sequence_alone(grammars: Grammars) -> None:
    matcher = grammars.matcher(LLMatcher.grammar_from_regex("a"))
    broken = sequence([1], [500], matcher=matcher)
    rows = torch.stack([logits(1), logits(2)])
    refused, fine = choose(rows, [broken, sequence(temperature=0)])
    assert isinstance(refused.error, errors.InvalidArgument)
    assert refused.error.field == "sampling.response_format"
    assert (fine.token_id, fine.error) == (int(rows[1].argmax()), None)


def test_a_grammar_that_is_none(grammars: Grammars) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        grammars.matcher(LLMatcher.grammar_from_regex("("))
    assert caught.value.field == "sampling.response_format"


def test_matchers_of_one_grammar_are_independent(grammars: Grammars, tokenizer: Tokenizer) -> None:
    source = LLMatcher.grammar_from_regex("(a|b){2}")
    one, other = grammars.matcher(source), grammars.matcher(source)
    (a,) = tokenizer.encode("a")
    before = other.allowed()
    one.push(a)
    one.push(a)
    assert np.flatnonzero(one.allowed()).tolist() == sorted(EOS)
    assert torch.equal(other.allowed(), before)
    assert torch.equal(grammars.matcher(source).allowed(), before)
