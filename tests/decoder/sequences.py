"""Sequences for tests of the sampler."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from chiasm.services.decoder.sequence import Sampling, Sequence


def sequence(
    prompt: Seq[int] = (1,), answer: Seq[int] = (), matcher: Any = None, **sampling: Any
) -> Sequence:
    """A sequence that has `answer` already, and has it from elsewhere."""
    return Sequence(
        request_id="r",
        token_ids=[*prompt, *answer],
        prompt_types=bytes(len(prompt)),
        positions=np.zeros((3, len(prompt)), dtype=np.int64),
        next_position=len(prompt),
        media=(),
        sampling=Sampling(**{"max_tokens": 1000, **sampling}),
        prompt_logits=False,
        num_resumed=len(answer),
        matcher=matcher,
    )
