"""The bundled model with 131,072 positions: logits against transformers, time and memory.

The weights are the bundled model's, computed in float32. Beyond the 4,096 positions that it was
trained for its answers mean nothing; the arithmetic is the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from chiasm import bundled
from chiasm.client import Client, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig

# The tests know how to read a checkpoint with transformers, and how to import that.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from processes import memory_bytes

CONTEXT = 131_072
COMPARED = (8_192, 32_768)
TIMEOUT_S = 3600.0
ONE_TOKEN = Sampling(max_tokens=1, temperature=0, ignore_eos=True)


def run(_: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Largest difference of the last logits by length; seconds and memory of a whole context."""
    with tempfile.TemporaryDirectory() as scratch:
        model = _lengthened(Path(scratch) / "model")
        with _stack(model) as (stack, endpoint), Client(endpoint, timeout_s=TIMEOUT_S) as client:
            compared = [_compare(client, model, length, report) for length in COMPARED]
            whole = _whole_context(client, stack, report)
    return {"compared": compared, "whole": whole}


def _lengthened(directory: Path) -> Path:
    shutil.copytree(bundled.CHECKPOINT, directory)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"max_position_embeddings": CONTEXT}
    file.write_text(json.dumps(config))
    return directory


def _compare(
    client: Client, model: Path, length: int, report: Callable[[str], None]
) -> dict[str, object]:
    ids = _prompt(length)
    found = client.complete(Tokens(token_ids=ids), sampling=ONE_TOKEN, prompt_logits=True)
    if found.prompt_logits is None:
        raise RuntimeError("no logits came")
    import conftest  # noqa: F401 # fits torchvision to torch
    from checkpoint.converters import reference_last_logits

    expected = reference_last_logits(model, ids)
    difference = float(np.abs(found.prompt_logits[-1] - expected.numpy()).max())
    is_same = found.token_ids == (int(expected.argmax()),)
    report(f"{length:7,} tokens: last logits differ by {difference:.1e}, same token: {is_same}")
    return {"tokens": length, "largest_difference": difference, "same_token": is_same}


def _whole_context(
    client: Client, stack: LocalStack, report: Callable[[str], None]
) -> dict[str, object]:
    decoder = stack.children["decoder"].pid
    ids = _prompt(CONTEXT - 1)
    before, start = memory_bytes(decoder, "VmHWM"), time.monotonic()
    client.complete(Tokens(token_ids=ids), sampling=ONE_TOKEN)
    seconds, grown = time.monotonic() - start, memory_bytes(decoder, "VmHWM") - before
    report(
        f"{CONTEXT - 1:7,} tokens: {seconds:.0f} s, and the decoder's most memory grew by "
        f"{grown / 2**20:.0f} MB"
    )
    return {"tokens": CONTEXT - 1, "seconds": seconds, "memory_growth_bytes": grown}


def _prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(10, 400, length).tolist()


@contextmanager
def _stack(model: Path) -> Iterator[tuple[LocalStack, str]]:
    settings = {
        "CHIASM_MAX_STEP_TOKENS": "2048",
        "CHIASM_KV_CACHE_TOKENS": str(CONTEXT + max(COMPARED)),
        "CHIASM_DEFAULT_TIMEOUT_S": str(TIMEOUT_S),
    }
    before = dict(os.environ)
    os.environ.update(settings)
    stack = LocalStack(StackConfig(model=model, dtype="float32"))
    try:
        yield stack, stack.start()
    finally:
        stack.stop()
        os.environ.clear()
        os.environ.update(before)
