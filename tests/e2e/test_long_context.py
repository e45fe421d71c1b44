"""Up to the last of 131,072 tokens: in chunks, in bounded memory, with the reference's logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint.converters import reference_last_logits
from processes import memory_bytes

from chiasm import errors
from chiasm.client import Client, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig
from chiasm.model.synth import PRESETS, synthesize

CONTEXT = 131_072
LOGITS_TOLERANCE = 1e-4
MAX_GROWTH_BYTES = 200 << 20
"""Of the decoder for a whole context: its keys and values, and a step's activations."""

ONE_TOKEN = Sampling(max_tokens=1, temperature=0, ignore_eos=True)

# A full context is 10^10 pairs of tokens: two layers with one head make that a matter of seconds.
SMALL = replace(
    PRESETS["tiny"],
    hidden_size=16,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    mrope_section=(3, 3, 2),
    max_position_embeddings=CONTEXT,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "model"
    synthesize(path, preset=SMALL, seed=5, dtype="float32")
    return path


@pytest.fixture(scope="module")
def stack(directory: Path) -> Iterator[LocalStack]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHIASM_MAX_STEP_TOKENS", "2048")
        environment.setenv("CHIASM_KV_CACHE_TOKENS", str(2 * CONTEXT))
        running = LocalStack(StackConfig(model=directory, dtype="float32"))
        try:
            running.start()
            yield running
        finally:
            running.stop()


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    address = stack.children["gateway"].address()
    assert address is not None
    with Client(address, timeout_s=240) as connected:
        yield connected


def prompt(num_tokens: int) -> list[int]:
    return np.random.default_rng(num_tokens).integers(10, 400, num_tokens).tolist()


@pytest.mark.parametrize("num_tokens", [8_192, 32_768])
def test_last_logits_are_the_references(client: Client, directory: Path, num_tokens: int) -> None:
    ids = prompt(num_tokens)
    expected = reference_last_logits(directory, ids)
    found = client.complete(Tokens(token_ids=ids), sampling=ONE_TOKEN, prompt_logits=True)
    assert found.prompt_logits is not None
    assert np.abs(found.prompt_logits[-1] - expected.numpy()).max() <= LOGITS_TOLERANCE
    assert found.token_ids == (int(expected.argmax()),)


def test_the_whole_context(client: Client, stack: LocalStack) -> None:
    """131,071 prompt tokens and one answer fit; the same prompt again is known but for its end."""
    ids = prompt(CONTEXT - 1)
    before = memory_bytes(stack.children["decoder"].pid, "VmHWM")
    found = client.complete(Tokens(token_ids=ids), sampling=ONE_TOKEN)
    assert memory_bytes(stack.children["decoder"].pid, "VmHWM") - before < MAX_GROWTH_BYTES
    assert found.usage.prompt_tokens == CONTEXT - 1
    assert found.finish_reason == "length"
    again = client.complete(Tokens(token_ids=ids), sampling=ONE_TOKEN)
    assert again.token_ids == found.token_ids


def test_one_more_token_is_refused(client: Client) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        client.complete(Tokens(token_ids=prompt(CONTEXT)), sampling=ONE_TOKEN)
    assert str(CONTEXT) in str(refused.value)
    with pytest.raises(errors.InvalidArgument) as refused:
        client.complete(
            Tokens(token_ids=prompt(CONTEXT - 1)), sampling=replace(ONE_TOKEN, max_tokens=2)
        )
    assert refused.value.field == "sampling.max_tokens"
