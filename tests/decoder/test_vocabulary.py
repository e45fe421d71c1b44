"""Token bytes of both kinds of tokenizer files: what a grammar allows is what the text will say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from llguidance import LLMatcher

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.decoder.grammars import Grammars

PATTERN = r"[a-d]{1,4} (ärger|图片|🙂)\n\d{2}"
CONTROL = ["<think>", "</think>", "<|IMAGE_PLACEHOLDER|>"]


@pytest.fixture(scope="module", params=["json", "sentencepiece"])
def directory(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "json":
        return tiny_checkpoint
    directory = tmp_path_factory.mktemp("sentencepiece")
    text = directory / "text.txt"
    text.write_text("\n".join(f"bad cab {i} Ärger ärger 图片 dab abba" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=[*CONTROL, *map(str, range(10))],
        minloglevel=2,
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<|VIDEO_PLACEHOLDER|>": 518}))
    return directory


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def grammars(directory: Path, config: ModelConfig) -> Grammars:
    return Grammars(directory, config)


@pytest.mark.parametrize("seed", range(10))
def test_random_walks_spell_matches(
    seed: int, directory: Path, config: ModelConfig, grammars: Grammars
) -> None:
    tokenizer = Tokenizer.load(directory)
    matcher = grammars.matcher(LLMatcher.grammar_from_regex(PATTERN))
    g = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < 60:
        token_id = int(g.choice(np.flatnonzero(matcher.allowed())))
        if token_id in config.tokens.eos:
            break
        ids.append(token_id)
        matcher.push(token_id)
    assert re.fullmatch(PATTERN, tokenizer.decode(ids))
    assert ids == tokenizer.visible(ids)


def test_control_tokens_are_never_text(directory: Path, grammars: Grammars) -> None:
    tokenizer = Tokenizer.load(directory)
    matcher = grammars.matcher(LLMatcher.grammar_from_regex(r"[\s\S]+"))
    allowed = matcher.allowed()
    ids = [i for i in map(tokenizer.token_id, CONTROL) if i is not None]
    assert len(ids) == len(CONTROL)
    assert not allowed[ids].any()
    assert not allowed[tokenizer.vocab_size :].any()
    assert allowed[tokenizer.encode("bad cab 图片 7")].all()


def test_directory_without_a_tokenizer(tmp_path: Path, config: ModelConfig) -> None:
    grammars = Grammars(tmp_path, config)
    with pytest.raises(errors.FailedPrecondition):
        grammars.matcher(LLMatcher.grammar_from_regex("a"))
