"""Text to token ids and back. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import pre_tokenizers

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.spm import SentencePieceVocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UNFINISHED = 16
"""Tokens held back before a place is looked for where the text may be cut after all."""


class Vocabulary(Protocol):
    """What a tokenizer file gives."""

    added: dict[str, int]
    """Spelling -> id of the tokens that are matched whole: control tokens, digits."""
    special_ids: frozenset[int]
    """Those that are no text: left out of decoded text, never found in encoded text."""
    byte_ids: frozenset[int]
    """Tokens `<0x00>`..`<0xFF>`, each one byte of a character that has no token of its own."""
    size: int

    def __contains__(self, token_id: int) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Tokenizer:
    """A checkpoint's tokenizer; safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Takes tokenizer.json, else tokenizer.model. Raises NotFound where there is neither,
        InvalidArgument for a damaged one."""
        if (directory / "tokenizer.json").is_file():
            return cls(_FastVocabulary(directory / "tokenizer.json"))
        if (directory / "tokenizer.model").is_file():
            return cls(SentencePieceVocabulary(directory / "tokenizer.model"))
        raise NotFound(
            f"{directory} has neither tokenizer.json nor tokenizer.model", reason="FILE_NOT_FOUND"
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids; the model's embedding may have more rows."""
        return self._vocabulary.size

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands after a special token of the prompt.

        Special tokens spelled out in `text` are ordinary characters. No bos is added.
        """
        return self._vocabulary.encode(text)

    def token_id(self, spelling: str) -> int | None:
        """Id of an added token, control tokens among them; None for what is ordinary text."""
        return self._vocabulary.added.get(spelling)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Ids outside the vocabulary yield nothing."""
        return self._vocabulary.decode(
            self.visible(token_ids) if skip_special_tokens else token_ids
        )

    def visible(self, token_ids: Iterable[int]) -> list[int]:
        """Without special tokens and ids that stand for nothing."""
        special_ids, vocabulary = self._vocabulary.special_ids, self._vocabulary
        return [i for i in token_ids if i not in special_ids and i in vocabulary]

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character."""
        return token_id in self._vocabulary.byte_ids


class _FastVocabulary:
    """tokenizer.json, read by `tokenizers`."""

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            raise InvalidArgument(file.name, f"is no tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        metaspace = self._tokenizer.pre_tokenizer
        if isinstance(metaspace, pre_tokenizers.Metaspace) and metaspace.prepend_scheme == "first":
            # Only what opens the prompt gets the extra space, and a prompt opens with a token.
            metaspace.prepend_scheme = "never"
            self._tokenizer.pre_tokenizer = metaspace
        tokens = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: token_id for token_id, token in tokens.items()}
        self.special_ids = frozenset(token_id for token_id, t in tokens.items() if t.special)
        spelled = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(token_id for token_id in spelled if token_id is not None)
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __contains__(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class IncrementalDecoder:
    """Turns tokens into text as they come.

    What `push` and `flush` return adds up to `Tokenizer.decode` of all tokens. Text is held back
    while its last character may be unfinished: while it ends with the replacement character, or
    with a byte token, because a run of bytes is valid or not as a whole.

    Only a window is decoded: the tokens held back, and before them those of the last text given
    out, since the decoding of a token may depend on whether it comes first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []
        self._given_text = ""
        self._held: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became complete with `token_ids`."""
        self._held.extend(self._tokenizer.visible(token_ids))
        if not self._held or self._tokenizer.is_byte(self._held[-1]):
            return ""
        text = self._decode(self._held)
        if not text.endswith(_REPLACEMENT):
            return self._give(len(self._held), text)
        if len(self._held) < _MAX_UNFINISHED:
            return ""
        return self._give_up_to_a_cut(text)

    def flush(self) -> str:
        """The rest, unfinished or not; the generation has ended."""
        return self._give(len(self._held), self._decode(self._held)) if self._held else ""

    def _decode(self, held: list[int]) -> str:
        """Text that `held` adds to what was given out."""
        return self._tokenizer.decode(self._given + held)[len(self._given_text) :]

    def _give(self, num_tokens: int, text: str) -> str:
        if text:  # tokens without text could not tell the next ones that they do not come first
            self._given, self._held = self._held[:num_tokens], self._held[num_tokens:]
            self._given_text = self._tokenizer.decode(self._given)
        return text

    def _give_up_to_a_cut(self, text: str) -> str:
        """Bytes that will never be text: gives out the part that no later token can change.

        A place between tokens is a cut when both sides decode apart to what they are together.
        """
        for num_tokens in range(len(self._held) - 1, 0, -1):
            head = self._decode(self._held[:num_tokens])
            if head + self._tokenizer.decode(self._held[num_tokens:]) == text:
                return self._give(num_tokens, head)
        return ""
