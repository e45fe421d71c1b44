"""The tiny checkpoint in every layout that is read, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint.converters import to_paddle, to_transformers

from chiasm.model.synth import synthesize

_WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "transformers-hub-names": lambda d, out: to_transformers(d, out, save_original_format=True),
    "transformers-native": lambda d, out: to_transformers(d, out, save_original_format=False),
    "paddle-fused": lambda d, out: to_paddle(d, out, fused=True),
    "paddle-unfused": lambda d, out: to_paddle(d, out, fused=False),
}


@pytest.fixture(scope="session")
def float32_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "tiny-float32"
    synthesize(directory, seed=3, dtype="float32")
    return directory


@pytest.fixture(scope="session", params=["bfloat16", "float32"])
def hub(request: pytest.FixtureRequest, tiny_checkpoint: Path, float32_checkpoint: Path) -> Path:
    """A checkpoint in the hub's layout, in both stored dtypes."""
    return {"bfloat16": tiny_checkpoint, "float32": float32_checkpoint}[str(request.param)]


@pytest.fixture(scope="session", params=list(_WRITERS))
def converted(
    request: pytest.FixtureRequest, hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The `hub` checkpoint in another layout, which names the directory."""
    layout = str(request.param)
    out = tmp_path_factory.mktemp("converted") / layout
    _WRITERS[layout](hub, out)
    return out
