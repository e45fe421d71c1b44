"""Guessed tokens: found where they should be, rare where they are wrong, unseen in answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.services.decoder import __main__ as program
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.decoder.engine import Engine
from chiasm.services.decoder.pools import LocalPool
from chiasm.services.decoder.sequence import (
    FailedEvent,
    FinishedEvent,
    Sampling,
    Sequence,
    TokenEvent,
)
from chiasm.services.decoder.speculation import (
    MAX_MATCH,
    MAX_PAUSE,
    MIN_MATCH,
    Drafts,
    Speculation,
    look_up,
    num_accepted,
)

LOGPROB_TOLERANCE = 1e-4
WAIT_S = 120
VOCABULARY = 400


def slow_look_up(tokens: list[int], count: int) -> list[int]:
    """The definition, word by word."""
    for length in range(MAX_MATCH, MIN_MATCH - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                found = list(tokens)
                for _ in range(count):
                    found.append(found[end + len(found) - len(tokens)])
                return found[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12))
def test_look_up_is_its_definition(tokens: list[int], count: int) -> None:
    assert look_up(np.array(tokens, dtype=np.uint32), count) == slow_look_up(tokens, count)


def test_the_longest_match_wins_and_of_those_the_latest() -> None:
    tokens = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert look_up(np.array(tokens, dtype=np.uint32), 2) == [7, 9]
    tokens = [2, 3, 7, 2, 3, 8, 2, 3]
    assert look_up(np.array(tokens, dtype=np.uint32), 3) == [8, 2, 3]
    assert look_up(np.array([5, 6, 4, 6], dtype=np.uint32), 3) == []


@pytest.mark.parametrize(
    ("draft", "chosen", "expected"),
    [((), (4,), 0), ((1, 2), (1, 2, 3), 2), ((1, 2), (1, 3, 2), 1), ((1, 2), (2, 2, 2), 0)],
)
def test_guesses_stand_up_to_the_first_wrong_one(
    draft: tuple[int, ...], chosen: tuple[int, ...], expected: int
) -> None:
    assert num_accepted(draft, chosen) == expected


def test_wrong_guesses_become_rare_and_right_ones_long() -> None:
    drafts, tokens, num_drafted = Drafts(8), [1, 2] * 10, []
    for _ in range(400):
        found = drafts.draft(tokens, 100)
        num_drafted.append(len(found))
        if found:
            drafts.record(0)
    assert num_drafted[0] == 8
    assert sum(map(bool, num_drafted)) < 400 / MAX_PAUSE + 10
    assert max(num_drafted[1:]) == 2
    while not drafts.draft(tokens, 100):
        pass
    for accepted, expected in ((2, 6), (3, 8), (8, 8), (1, 4)):
        drafts.record(accepted)
        assert len(drafts.draft(tokens, 100)) == expected
    assert len(drafts.draft(tokens, 3)) == 3
    assert drafts.draft(tokens, 0) == ()


# The engine, with guesses by an oracle that errs now and then: every number of guesses stands.


class Oracle:
    """Knows the answers by the prompt."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], random: Random) -> None:
        self._answers, self._random = answers, random

    def draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        Speculation(1).draft(sequence, 1)  # makes the books, unless the request is left alone
        if sequence.drafts is None:
            return ()
        answer = self._answers[tuple(sequence.token_ids[: sequence.num_prompt])]
        truth = answer[sequence.num_generated :][: self._random.randint(0, min(room, 12))]
        return tuple(t if self._random.random() < 0.85 else 5 for t in truth)


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path) -> Callable[..., Any]:
    """Engines over one set of weights."""
    base = DecoderSettings(model=tiny_checkpoint, dtype="float32", colocate=True)
    config = ModelConfig.load(tiny_checkpoint)
    model, banks = program._load_weights(base, config)

    @contextmanager
    def running(**settings: Any) -> Iterator[Engine]:
        chosen = base.model_copy(update=settings)
        engine = program._engine(chosen, config, model, {b.modality: _pool(b) for b in banks})
        engine.start()
        try:
            yield engine
        finally:
            engine.close()

    return running


def _pool(bank: ExpertBank) -> LocalPool:
    return LocalPool(bank)


class Asked:
    """A request and what becomes of it."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self.done = threading.Event()
        self.tokens: list[TokenEvent] = []
        self.reason: object = None
        self.sequence = Sequence(
            request_id="r",
            token_ids=list(prompt),
            prompt_types=bytes(len(prompt)),
            positions=np.tile(np.arange(len(prompt)), (3, 1)),
            next_position=len(prompt),
            media=(),
            sampling=sampling,
            prompt_logits=False,
            sink=self._sink,
        )

    @property
    def ids(self) -> list[int]:
        assert self.done.wait(WAIT_S)
        return [event.token_id for event in self.tokens]

    def _sink(self, event: object) -> None:
        match event:
            case TokenEvent():
                assert self.reason is None
                self.tokens.append(event)
            case FinishedEvent() | FailedEvent():
                self.reason = event
                self.done.set()


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    found = [generator.integers(10, VOCABULARY, n).tolist() for n in (3, 17, 40, 90, 16, 33)]
    found[2] = found[2][:10] * 4
    return found


SAMPLINGS = [
    Sampling(max_tokens=40, temperature=0),
    Sampling(max_tokens=40, temperature=0.9, seed=3, top_p=0.9),
    Sampling(max_tokens=40, temperature=1.1, seed=4, logprobs=3),
    Sampling(max_tokens=1, temperature=0),
    Sampling(max_tokens=33, temperature=0.7, seed=2**64 - 1, top_k=5),
    Sampling(max_tokens=30, temperature=0.8, seed=6, frequency_penalty=0.5),
]


def ask(engine: Engine, samplings: list[Sampling]) -> list[Asked]:
    asked = [Asked(p, s) for p, s in zip(prompts(), samplings, strict=True)]
    for request in asked:
        engine.submit(request.sequence)
    for request in asked:
        assert request.ids
    return asked


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"chiasm_decoder_{name}_total") or 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batches": "on"},
        {"max_step_tokens": 7, "block_size": 4},
        {"block_size": 4, "kv_cache_tokens": 184},
    ],
    ids=["plain", "micro-batches", "small steps", "preemption"],
)
def test_answers_are_those_without_guesses(
    settings: dict[str, Any], make: Callable[..., Any]
) -> None:
    with make() as engine:
        expected = ask(engine, SAMPLINGS)
    # Some answers end at a stop token, which is then amid right guesses.
    samplings = list(SAMPLINGS)
    stops = frozenset(expected[0].ids[21:22])
    samplings[0] = Sampling(max_tokens=40, temperature=0, stop_token_ids=stops)
    answers = {tuple(p): e.ids for p, e in zip(prompts(), expected, strict=True)}
    with make(speculation="ngram", **settings) as engine:
        engine._scheduler._drafter = Oracle(answers, Random(7))
        before = {n: counted(n) for n in ("drafted_tokens", "accepted_tokens", "preemptions")}
        found = ask(engine, samplings)
        grown = {name: counted(name) - value for name, value in before.items()}
        again = ask(engine, samplings)
        assert engine.load().kv_tokens_used == 0
        engine._scheduler.blocks.check()
    first = expected[0].ids
    answer = first[: first.index(first[21]) + 1]
    for one, other, wanted in zip(found, again, expected, strict=True):
        ids = answer if wanted is expected[0] else wanted.ids
        assert one.ids == other.ids == ids
        for event, reference in zip(one.tokens, wanted.tokens, strict=False):
            assert (event.logprob is None) == (reference.logprob is None)
            if event.logprob is not None and reference.logprob is not None:
                assert abs(event.logprob - reference.logprob) < LOGPROB_TOLERANCE
                assert [i for i, _ in event.top] == [i for i, _ in reference.top]
    assert isinstance(found[0].reason, FinishedEvent)
    assert found[0].reason.reason == "stop"
    assert 0 < grown["accepted_tokens"] < grown["drafted_tokens"]
    if "kv_cache_tokens" in settings:
        assert grown["preemptions"] > 0


def test_look_up_shortens_the_way(make: Callable[..., Any]) -> None:
    """Greedy answers that repeat themselves: the same tokens in fewer steps."""
    sampling = Sampling(max_tokens=120, temperature=0)
    steps, answers = {}, {}
    for mode in ("off", "ngram"):
        with make(speculation=mode) as engine:
            request = Asked(prompts()[2], sampling)
            engine.submit(request.sequence)
            answers[mode], steps[mode] = request.ids, engine.steps
    assert answers["ngram"] == answers["off"]
    assert steps["ngram"] < steps["off"] == 120


def test_colocated_experts_count_their_tokens(make: Callable[..., Any]) -> None:
    """Each token of a layer once for each of its experts."""

    def total() -> float:
        samples = [s for m in REGISTRY.collect() for s in m.samples]
        return sum(s.value for s in samples if s.name == "chiasm_expert_tokens_total")

    before = total()
    with make() as engine:
        request = Asked([1] * 20, Sampling(max_tokens=5, temperature=0))
        engine.submit(request.sequence)
        assert len(request.ids) == 5
        text = engine._forward_pass.model.model.config
    assert total() - before == (20 + 4) * text.moe_k * sum(text.sparse_layers)


def test_requests_with_processors_are_left_alone() -> None:
    speculation = Speculation(4)
    for sampling, is_wanted in (
        (Sampling(max_tokens=9), True),
        (Sampling(max_tokens=9, logprobs=2, top_p=0.5, seed=3), True),
        (Sampling(max_tokens=9, presence_penalty=0.1), False),
        (Sampling(max_tokens=9, min_tokens=3), False),
        (Sampling(max_tokens=9, logit_bias=((3, 1.0),)), False),
        (Sampling(max_tokens=9, think_end_ids=(4,), thinking_budget=3), False),
    ):
        sequence = Asked([1, 2, 3, 1, 2, 3], sampling).sequence
        assert bool(speculation.draft(sequence, 4)) is is_wanted
