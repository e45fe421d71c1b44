"""Text to token ids and back. No torch."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import pre_tokenizers

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.spm import SentencePieceVocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NO_CHARACTER = re.compile("[\\udc80-\\udcff]")
"""What the error handler `surrogateescape` makes of bytes that are part of no character."""

_WINDOW = 4
"""Tokens that tell how the next one reads: an unfinished character's, at most three, and one more
before them."""


class Vocabulary(Protocol):
    """What a tokenizer file gives."""

    added: dict[str, int]
    """Spelling -> id of the tokens that are matched whole: control tokens, digits."""
    special_ids: frozenset[int]
    """Those that are no text: left out of decoded text, never found in encoded text."""
    byte_ids: Mapping[int, int]
    """Id -> byte of the tokens `<0x00>`..`<0xFF>`: bytes of characters without a token."""
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

    def bytes_of(self, token_ids: Iterable[int]) -> bytes:
        """What tokens that are bytes stand for."""
        return bytes(self._vocabulary.byte_ids[token_id] for token_id in token_ids)


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
        self.byte_ids: Mapping[int, int] = self._byte_ids()
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __contains__(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _byte_ids(self) -> dict[int, int]:
        ids: dict[int, int] = {}
        for byte in range(256):
            spelling = f"<0x{byte:02X}>"
            token_id = self._tokenizer.token_to_id(spelling)
            # Where the decoder knows no byte tokens, one that is spelled so is text.
            if token_id is not None and self.decode([token_id]) != spelling:
                ids[token_id] = byte
        return ids


class IncrementalDecoder:
    """Turns tokens into text as they come; never holds back more than one unfinished character.

    What `push` and `flush` return adds up to `Tokenizer.decode` of all tokens, but for bytes that
    are no UTF-8: each yields a replacement character here, while `decode` of a tokenizer.json lets
    them spoil the characters beside them, which have been given out by then.

    A run of byte tokens is decoded by itself. Other tokens are decoded together with those before
    them, since a token may read otherwise where it comes first, or finish a character that the last
    ones began; text that ends with the replacement character may be of that kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._window: list[int] = []
        self._num_given = 0  # characters of the window's text

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became complete with `token_ids`."""
        text = ""
        visible = self._tokenizer.visible(token_ids)
        for is_byte, run in itertools.groupby(visible, self._tokenizer.is_byte):
            push = self._push_bytes if is_byte else self._push_whole
            text += push(list(run))
        return text

    def flush(self) -> str:
        """The rest, unfinished or not; the generation has ended."""
        return self._end_bytes() + self._end_window()

    def _push_bytes(self, token_ids: list[int]) -> str:
        text = self._end_window()
        self._slide(token_ids, num_unfinished=0)
        return text + _shown(self._bytes.decode(self._tokenizer.bytes_of(token_ids)))

    def _push_whole(self, token_ids: list[int]) -> str:
        """Text of tokens that are no bytes."""
        tokens = self._window + token_ids
        text = self._tokenizer.decode(tokens)
        num_unfinished = int(text.endswith(_REPLACEMENT))
        given = text[self._num_given : len(text) - num_unfinished]
        self._slide(tokens, num_unfinished)
        return self._end_bytes() + given

    def _slide(self, tokens: list[int], num_unfinished: int) -> None:
        self._window = tokens[-_WINDOW:]
        self._num_given = len(self._tokenizer.decode(self._window)) - num_unfinished

    def _end_bytes(self) -> str:
        return _shown(self._bytes.decode(b"", final=True))

    def _end_window(self) -> str:
        rest = self._tokenizer.decode(self._window)[self._num_given :]
        self._num_given += len(rest)
        return rest


def _shown(text: str) -> str:
    return _NO_CHARACTER.sub(_REPLACEMENT, text)
