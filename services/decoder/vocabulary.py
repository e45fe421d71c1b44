"""The checkpoint's vocabulary as llguidance wants it: the bytes that each token stands for."""

from __future__ import annotations

from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.model.spm import SentencePieceVocabulary


def load_vocabulary(directory: Path, config: ModelConfig) -> LLTokenizer:
    """From tokenizer.json, else from tokenizer.model. Raises FailedPrecondition without either.

    Ids up to the model's vocabulary size that the tokenizer does not know are never allowed.
    """
    eos, size = list(config.tokens.eos), config.text.vocab_size
    if (directory / "tokenizer.json").is_file():
        return LLTokenizer(str(directory / "tokenizer.json"), n_vocab=size, eos_token=eos)
    if (directory / "tokenizer.model").is_file():
        return LLTokenizer(TokenizerWrapper(_Pieces(directory, config)), eos_token=eos)
    raise errors.FailedPrecondition(
        "the decoder's model directory has no tokenizer, which structured answers need",
        reason="FILE_NOT_FOUND",
    )


class _Pieces:
    """A SentencePiece model with the attributes that llguidance reads."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        vocabulary = SentencePieceVocabulary(directory / "tokenizer.model")
        tokens = vocabulary.token_bytes()[: config.text.vocab_size]
        self.tokens = tokens + [b""] * (config.text.vocab_size - len(tokens))
        self.special_token_ids = sorted(i for i in vocabulary.special_ids if i < len(tokens))
        self.eos_token_id, self.bos_token_id = config.tokens.eos[0], config.tokens.bos
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)
