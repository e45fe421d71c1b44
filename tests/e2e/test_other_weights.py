"""A server with other weights is no replica: one answer is made with one kind of weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.cluster import Cluster
from e2e.disturbed import TEXT, Peace, assert_same, picture_prompt, running_cluster, start

from chiasm.model.synth import synthesize
from chiasm.types import Modality


@pytest.fixture
def stack(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Cluster]:
    logs = tmp_path / "logs"
    with running_cluster(tiny_checkpoint, logs, park_timeout_s=60, text_servers=2) as running:
        yield running


def test_it_takes_over_when_the_others_are_gone(stack: Cluster, tmp_path: Path) -> None:
    synthesize(tmp_path / "other", seed=1)
    before = Peace(stack.endpoint)
    expected = [before.answer(prompt) for prompt in (TEXT, picture_prompt(1))]
    old_weights = stack.topology().pool(Modality.TEXT).weights
    stack.add("text-pool-0", "--model", str(tmp_path / "other"), "--shards", "0,1/2")
    assert stack.topology().pool(Modality.TEXT).weights == old_weights
    for prompt, answer in zip((TEXT, picture_prompt(1)), expected, strict=True):
        assert_same(start(stack, prompt).result(), answer)
    for name in ("text-pool-0", "text-pool-1"):
        stack.terminate(name)
        stack.wait_exit(name)
        stack.wait_gone(name)
    assert stack.topology().pool(Modality.TEXT).weights != old_weights
    after = start(stack, TEXT).result()
    assert after.prompt_logits is not None
    assert expected[0].prompt_logits is not None
    assert not np.allclose(after.prompt_logits, expected[0].prompt_logits, atol=0.01)
    assert_same(start(stack, TEXT).result(), after)
