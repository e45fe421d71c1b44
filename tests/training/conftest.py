"""A checkpoint without weights that matter: the bundled model's tokenizer and preprocessing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chiasm.model import synth_tokenizer
from chiasm.training.data import tokenizer
from chiasm.training.data.encode import Encoder
from chiasm.training.data.processing import write_processing


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration, tokenizer and preprocessing; no weights."""
    directory = tmp_path_factory.mktemp("bundled")
    trained = tokenizer.train()
    synth_tokenizer.write_tokenizer(trained, directory, model_max_length=4096)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["vocab_size"] = tokenizer.VOCAB_SIZE
    config["im_patch_id"] = trained.token_to_id("<|IMAGE_PLACEHOLDER|>")
    (directory / "config.json").write_text(json.dumps(config))
    end = trained.token_to_id("<|end_of_sentence|>")
    generation = {"bos_token_id": 1, "eos_token_id": [2, end], "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    write_processing(directory)
    return directory


@pytest.fixture(scope="session")
def encoder(checkpoint: Path) -> Encoder:
    return Encoder.load(checkpoint)


@pytest.fixture(scope="session")
def random_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and their own tokenizer, with the bundled model's preprocessing."""
    directory = tmp_path_factory.mktemp("random") / "model"
    shutil.copytree(tiny_checkpoint, directory)
    write_processing(directory)
    return directory
