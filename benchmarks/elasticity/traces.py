"""What is asked of the system: four days that strain different parts of it, made from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from benchmarks.elasticity.rates import Rates

TEXT_TOKENS = 200, 120
"""Of the prompt and of the answer, on average."""

IMAGE_TOKENS = 30, 40
"""The same of a question about an image, without the image's own."""

IMAGE_PATCHES = 1400
VIRAL = 1
"""Digest of the image that everybody sends; 0 is one of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """at: seconds. images: patches of each; digest: of the first one, 0 when nobody else has it."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    images: tuple[int, ...] = ()
    digest: int = 0


class _Tokens(TypedDict):
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Loads over time, in replicas that would be fully used: of text experts by text requests, and
    of encoders by requests with an image. `viral_share` of the latter bring the same image."""

    name: str
    seconds: float
    text: Callable[[float], float]
    images: Callable[[float], float]
    viral_share: Callable[[float], float] = lambda _: 0.0


def scenarios(seconds: float, seed: int) -> Sequence[Scenario]:
    """The four. `seconds` is the length of the day."""
    bursts = np.random.default_rng(seed).uniform(0.05, 0.9, 4) * seconds

    def day(at: float) -> float:
        """From 0.4 to 3.2 and back."""
        return 1.8 - 1.4 * math.cos(2 * math.pi * at / seconds)

    def is_burst(at: float) -> bool:
        return any(start <= at < start + 0.04 * seconds for start in bursts)

    def crowd(at: float) -> float:
        since = at - 0.4 * seconds
        return 1.0 if since < 0 else 1.0 + 4.5 * math.exp(-since / (0.08 * seconds))

    def viral(at: float) -> bool:
        return 0.3 * seconds <= at < 0.6 * seconds

    return [
        Scenario(name="diurnal text", seconds=seconds, text=day, images=lambda _: 0.0),
        Scenario(
            name="image bursts",
            seconds=seconds,
            text=lambda _: 1.0,
            images=lambda at: 3.0 if is_burst(at) else 0.0,
        ),
        Scenario(
            name="viral image",
            seconds=seconds,
            text=lambda _: 1.0,
            images=lambda at: 3.0 if viral(at) else 0.2,
            viral_share=lambda at: 0.95 if viral(at) else 0.0,
        ),
        Scenario(name="flash crowd", seconds=seconds, text=crowd, images=lambda _: 0.1),
    ]


def requests(scenario: Scenario, rates: Rates, seed: int) -> Sequence[Request]:
    """Poisson arrivals, in order; lengths are exponential around the means."""
    random = np.random.default_rng((seed, len(scenario.name)))
    text_s = sum(TEXT_TOKENS) * rates.text_token_s
    image_s = IMAGE_PATCHES * rates.patch_s
    made = [
        Request(at=at, **_tokens(random, TEXT_TOKENS))
        for at in _arrivals(scenario.seconds, lambda at: scenario.text(at) / text_s, random)
    ]
    for at in _arrivals(scenario.seconds, lambda at: scenario.images(at) / image_s, random):
        is_viral = random.random() < scenario.viral_share(at)
        patches = IMAGE_PATCHES if is_viral else _around(random, IMAGE_PATCHES)
        made.append(
            Request(
                at=at,
                **_tokens(random, IMAGE_TOKENS),
                images=(patches,),
                digest=VIRAL if is_viral else 0,
            )
        )
    return sorted(made, key=lambda request: request.at)


def _arrivals(
    seconds: float, rate: Callable[[float], float], random: np.random.Generator
) -> Iterator[float]:
    """A Poisson process whose rate changes, by thinning."""
    top = max(rate(at) for at in np.linspace(0, seconds, 2000))
    at = 0.0
    while top > 0 and (at := at + random.exponential(1 / top)) < seconds:
        if random.random() * top < rate(at):
            yield at


def _tokens(random: np.random.Generator, mean: tuple[int, int]) -> _Tokens:
    prompt, answer = mean
    return {"prompt_tokens": _around(random, prompt), "answer_tokens": _around(random, answer)}


def _around(random: np.random.Generator, mean: int) -> int:
    """Half of it at least, so that nothing is trivially short."""
    return round(mean * (0.5 + random.exponential(0.5)))
