"""Drawing: every filter against its definition and against transformers; nothing else matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoder.sequences import sequence
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chiasm.services.decoder import draw as module
from chiasm.services.decoder.draw import draw
from chiasm.services.decoder.sampler import choose
from chiasm.services.decoder.sequence import Sampling

NUM_DRAWS = 4000
TOLERANCE = 0.03
"""Of a frequency among NUM_DRAWS independent draws: more than 4 standard deviations."""

NUM_STRATA = 3000
STRATA_TOLERANCE = 1.5 / NUM_STRATA
"""Of a frequency among evenly spread random numbers: an interval holds at most one too many."""


def samplings(count: int, **params: Any) -> list[Sampling]:
    return [Sampling(**{"max_tokens": 1, "seed": 11, **params})] * count


def draws(logits: torch.Tensor, **params: Any) -> list[int]:
    rows = logits.expand(NUM_DRAWS, -1)
    return draw(rows, samplings(NUM_DRAWS, **params), range(NUM_DRAWS))


def distribution(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, **params: Any
) -> np.ndarray:
    """Probabilities that `draw` gives each token, to within STRATA_TOLERANCE."""
    monkeypatch.setattr(module, "_uniform", lambda _, step: (step + 0.5) / NUM_STRATA)
    rows = logits.expand(NUM_STRATA, -1)
    found = draw(rows, samplings(NUM_STRATA, **params), range(NUM_STRATA))
    return np.bincount(found, minlength=logits.numel()) / NUM_STRATA


def definition(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """temperature -> min_p -> top_k -> top_p, written down."""

    def softmax(x: np.ndarray) -> np.ndarray:
        weights = np.exp(x - x.max())
        return np.asarray(weights / weights.sum())

    x = logits.double().numpy() / temperature
    probs = softmax(x)
    x = np.where(probs < min_p * probs.max(), -np.inf, x)
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, len(x))], -np.inf, x)
    probs = softmax(x)
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    dropped = order[(before >= top_p) & (np.arange(len(x)) > 0)]
    probs[dropped] = 0
    return np.asarray(probs / probs.sum())


def random_logits(seed: int, size: int = 60, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 3.0, 1.0, 5.0]])
    assert draw(logits, samplings(2, temperature=0), [0, 7]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    found = torch.bincount(torch.tensor(draws(logits, temperature=temperature)), minlength=4)
    expected = torch.softmax(logits / temperature, dim=-1)
    assert torch.allclose(found / NUM_DRAWS, expected, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"temperature": 0.3}, TemperatureLogitsWarper(0.3)),
        ({"temperature": 1.7}, TemperatureLogitsWarper(1.7)),
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_k": 500}, TopKLogitsWarper(500)),
        ({"top_p": 0.1}, TopPLogitsWarper(0.1)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 0.6}, MinPLogitsWarper(0.6)),
    ],
)
def test_a_filter_is_that_of_transformers(
    params: dict[str, Any], warper: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(seed)
    expected = torch.softmax(warper(None, logits[None].clone())[0], dim=-1).numpy()
    found = distribution(monkeypatch, logits, **params)
    assert np.abs(found - expected).max() <= STRATA_TOLERANCE
    assert not found[expected == 0].any()


@pytest.mark.parametrize("seed", range(12))
def test_all_filters_together(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(seed)
    params: dict[str, Any] = {
        "temperature": float(g.uniform(0.3, 2)),
        "min_p": float(g.uniform(0, 0.2)),
        "top_k": int(g.integers(0, 30)),
        "top_p": float(g.uniform(0.3, 1)),
    }
    logits = random_logits(seed, scale=float(g.uniform(0.5, 4)))
    found = distribution(monkeypatch, logits, **params)
    assert np.abs(found - definition(logits, **params)).max() <= STRATA_TOLERANCE


def test_top_k_keeps_equals_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 3.0])
    found = distribution(monkeypatch, logits, top_k=3)
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 4]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, top_p=0.6)) == {0, 1}
    assert set(draws(logits, top_p=0.45)) == {0}
    assert set(draws(logits, top_p=1e-9)) == {0}


def test_forbidden_tokens_never_come() -> None:
    logits = torch.full((300,), float("-inf"))
    logits[[7, 250]] = torch.tensor([0.0, -20.0])
    for params in ({}, {"top_k": 100}, {"top_p": 0.999999}, {"temperature": 50.0}):
        assert set(draws(logits, **params)) <= {7, 250}


@pytest.mark.parametrize("extreme", [0.0, module._BELOW_ONE])
def test_extreme_random_numbers_hit_tokens_that_are_left(
    extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_uniform", lambda *_: extreme)
    logits = torch.tensor([[float("-inf"), 1.0, 0.3, 2.0, float("-inf")]])
    for params in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.01}):
        assert draw(logits, samplings(1, **params), [0])[0] in (1, 2, 3)


def test_hot_and_cold_extremes_are_finite() -> None:
    logits = random_logits(3)
    best = int(logits.argmax())
    assert set(draws(logits, temperature=1e-20)) == {best}
    assert set(draws(logits, temperature=1e-20, top_p=0.9)) == {best}
    assert len(set(draws(logits, temperature=1e20))) == logits.numel()


@pytest.mark.parametrize("kind", ["random", "ties", "flat"])
def test_looking_at_few_tokens_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short cut, fall-back and full sort agree; with equal logits the lower id comes first."""
    size, count = 2000, 64
    logits = torch.stack([random_logits(i, size, 1.5) for i in range(count)])
    if kind == "ties":
        logits = logits.round()
    if kind == "flat":
        logits = logits * 1e-3
    g = np.random.default_rng(0)
    params = [
        Sampling(
            max_tokens=1,
            seed=i,
            top_k=int(g.choice([0, 1, 5, 40, 1500, 5000])),
            top_p=float(g.choice([0.2, 0.7, 0.95, 0.9999])),
        )
        for i in range(count)
    ]
    found = []
    for width in (1, 50, module._WIDTH, size):
        monkeypatch.setattr(module, "_WIDTH", width)
        found.append(draw(logits, params, range(count)))
    assert found[0] == found[1] == found[2] == found[3]


def test_a_seed_and_a_step_fix_the_token() -> None:
    logits = random_logits(0, 100, 1.0)
    first = draws(logits, seed=2**64 - 1)[:50]
    assert first == draws(logits, seed=2**64 - 1)[:50]
    assert first != draws(logits, seed=6)[:50]
    assert len(set(first)) > 10


def mixed(count: int, seed: int) -> list[dict[str, Any]]:
    g = np.random.default_rng(seed)
    return [
        {
            "temperature": float(g.choice([0, 0.5, 1.0, 1.5])),
            "top_k": int(g.choice([0, 0, 3, 50])),
            "top_p": float(g.choice([1.0, 1.0, 0.5, 0.95])),
            "min_p": float(g.choice([0.0, 0.0, 0.1])),
            "repetition_penalty": float(g.choice([1.0, 1.3])),
            "presence_penalty": float(g.choice([0.0, 0.5])),
            "logit_bias": ((int(g.integers(300)), 3.0),) if g.random() < 0.3 else (),
            "logprobs": None if g.random() < 0.7 else int(g.integers(0, 4)),
            "seed": int(g.integers(2**63)),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_in_the_batch_do_not_matter(seed: int) -> None:
    count, size = 24, 1500
    params = mixed(count, seed)
    together = [sequence([5, 6], **p) for p in params]
    alone = [sequence([5, 6], **p) for p in params]
    for step in range(5):
        logits = torch.stack(
            [random_logits(100 * seed + 10 * step + i, size) for i in range(count)]
        )
        before = logits.clone()
        batch = choose(logits, together)
        assert torch.equal(logits, before)
        for i, single in enumerate(alone):
            assert choose(logits[i : i + 1], [single]) == [batch[i]]
            for owner in (single, together[i]):
                owner.token_ids.append(batch[i].token_id)


def test_logprobs_are_the_raw_ones() -> None:
    logits = torch.stack([random_logits(1, 50), random_logits(2, 50), random_logits(3, 50)])
    wanted = [
        sequence(temperature=0.2, logprobs=3, logit_bias=((9, 50.0),)),
        sequence(temperature=0),
        sequence(top_k=1, logprobs=0),
    ]
    first, second, third = choose(logits, wanted)
    expected = logits.log_softmax(-1)
    assert first.token_id == 9  # biased, which its log-probability does not know
    assert first.logprob == pytest.approx(float(expected[0, 9]))
    best = expected[0].topk(3)
    assert [i for i, _ in first.top] == best.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(best.values.tolist())
    assert (second.logprob, second.top) == (None, ())
    assert third.logprob == pytest.approx(float(expected[2].max()))
    assert third.top == ()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_likeliest_token_fails_alone(broken: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    kinds: list[dict[str, Any]] = [{}, {"top_k": 5}, {"temperature": 0.0}, {"logprobs": 2}]
    owners = [sequence([1, 2], seed=i, **kind) for i, kind in enumerate(kinds)]
    expected = choose(logits, owners)
    for i in range(4):
        damaged = logits.clone()
        damaged[i] = broken if broken < 0 else torch.where(torch.arange(50) == 9, broken, logits[i])
        before = damaged.clone()
        found = choose(damaged, owners)
        assert torch.equal(damaged.nan_to_num(), before.nan_to_num())
        assert [c.error is not None for c in found] == [j == i for j in range(4)]
        assert [c for j, c in enumerate(found) if j != i] == [
            c for j, c in enumerate(expected) if j != i
        ]


def test_penalties_that_leave_the_range_of_numbers_fail_their_own_request_alone() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).abs() + 1
    wild = sequence(range(50), repetition_penalty=1e-40)
    found = choose(logits, [wild, sequence([1], seed=3)])
    assert found[0].error is not None
    assert found[1] == choose(logits[1:], [sequence([1], seed=3)])[0]
