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
    """A SentencePiece model with the attributes that llguidance reads, and how it spells text."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        vocabulary = SentencePieceVocabulary(directory / "tokenizer.model")
        tokens = vocabulary.token_bytes()[: config.text.vocab_size]
        self.tokens = tokens + [b""] * (config.text.vocab_size - len(tokens))
        self.special_token_ids = sorted(i for i in vocabulary.special_ids if i < len(tokens))
        self.eos_token_id, self.bos_token_id = config.tokens.eos[0], config.tokens.bos
        self._encode = vocabulary.encode
        text_ids = [i for i, t in enumerate(tokens) if t and i not in vocabulary.special_ids]
        # Where a byte token spells the same as another one, the other one is kept.
        text_ids.sort(key=lambda i: i not in vocabulary.byte_ids)
        self._ids = {tokens[i]: i for i in text_ids}
        self._max_bytes = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that spell exactly `text`: the model's own where it adds and changes nothing."""
        try:
            ids = self._encode(text.decode())
        except UnicodeDecodeError:
            return self._longest_first(text)
        is_exact = b"".join(self.tokens[i] for i in ids) == text
        return ids if is_exact else self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        """Bytes that no token begins with are left out."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            for length in range(min(self._max_bytes, len(text) - start), 0, -1):
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    ids.append(token_id)
                    start += length
                    break
            else:
                start += 1
        return ids
