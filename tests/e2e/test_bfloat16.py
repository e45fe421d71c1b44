"""bfloat16 through the whole system: as near to the float32 reference as transformers' bfloat16.

Rounding moves near-tied experts and so single logits by far more than an ulp, in any two correct
implementations; bounds are therefore on the average over all positions of all cases, and on how
often the likeliest token is the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from e2e import checkpoints
from e2e.cases import cases
from e2e.reference import Reference
from e2e.stack import up

from chiasm.client import Sampling

RATIO_TO_REFERENCE = 1.5
"""Bound of our mean distance from float32 over the reference's own."""

MEAN_TOLERANCE = 0.04
"""Bound of the mean distance, in standard deviations of the logits."""

MIN_AGREEMENT = 0.9
"""Share of positions whose likeliest token is the float32 one."""


@pytest.mark.parametrize(("make", "seed"), [(checkpoints.hub, 21), (checkpoints.saved, 22)])
def test_prompt_logits(make: object, seed: int, tmp_path: Path) -> None:
    directory = make(tmp_path, seed)  # type: ignore[operator]
    exact, half = Reference.of(directory), Reference.of(directory, torch.bfloat16)
    ours, theirs, agreed, spread = [], [], [], []
    flags = ("--dtype", "bfloat16", "--text-shards", "4", "--video-advance", "transformers")
    with up(directory, *flags) as client:
        for case in cases():
            found = client.complete(
                case.messages, sampling=Sampling(max_tokens=1, temperature=0), prompt_logits=True
            ).prompt_logits
            assert found is not None
            expected = exact.logits(case)
            ours.append(np.abs(found - expected).ravel())
            theirs.append(np.abs(half.logits(case) - expected).ravel())
            agreed.append(found.argmax(-1) == expected.argmax(-1))
            spread.append(expected.ravel())
    distance, their_distance = np.concatenate(ours), np.concatenate(theirs)
    assert distance.mean() <= RATIO_TO_REFERENCE * their_distance.mean()
    assert np.median(distance) <= RATIO_TO_REFERENCE * np.median(their_distance)
    assert distance.mean() <= MEAN_TOLERANCE * np.concatenate(spread).std()
    assert np.concatenate(agreed).mean() >= MIN_AGREEMENT
