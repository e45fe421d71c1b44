"""The tokenizer of a checkpoint that has only the original `tokenizer.model`. No torch.

Control tokens sit in that model as user-defined pieces, which SentencePiece would find in anybody's
text. They are turned into control pieces here: those keep their ids and never match text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from chiasm.errors import InvalidArgument
from chiasm.model.section import Section

_PROTO: Any = sentencepiece_model_pb2  # its classes are made at run time
_PIECE = _PROTO.ModelProto.SentencePiece
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class SentencePieceVocabulary:
    """The model's pieces and the tokens that the checkpoint's JSON files add to them."""

    def __init__(self, file: Path) -> None:
        """Raises InvalidArgument for a file that is no SentencePiece model."""
        try:
            model = _PROTO.ModelProto.FromString(file.read_bytes())
            pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
            added, special = _added_tokens(file.parent, pieces)
            for piece in model.pieces:
                _classify(piece, special)
            self._model = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
        except InvalidArgument:
            raise
        except Exception as error:  # protobuf and SentencePiece share no narrower class
            raise InvalidArgument(file.name, f"is no SentencePiece model: {error}") from None
        kinds = [piece.type for piece in model.pieces]
        whole = (_PIECE.CONTROL, _PIECE.UNKNOWN, _PIECE.USER_DEFINED)
        self.added = {p.piece: i for i, p in enumerate(model.pieces) if p.type in whole} | added
        self.special_ids = frozenset(
            [i for i, kind in enumerate(kinds) if kind in (_PIECE.CONTROL, _PIECE.UNKNOWN)]
            + [self.added[content] for content in special if content in self.added]
        )
        self.byte_ids: Mapping[int, int] = {
            i: int(piece.piece[3:5], 16)
            for i, piece in enumerate(model.pieces)
            if piece.type == _PIECE.BYTE
        }
        self.size = max(len(kinds), *(token_id + 1 for token_id in self.added.values()))
        self._num_pieces = len(kinds)
        self._content = {token_id: content for content, token_id in self.added.items()}
        self._outside = self._pattern()

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < self._num_pieces or token_id in self._content

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it are ordinary characters."""
        if self._outside is None:
            return list(self._model.encode(text))
        ids: list[int] = []
        for position, run in enumerate(self._outside.split(text)):
            ids.extend([self.added[run]] if position % 2 else self._model.encode(run))
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`; ids that stand for nothing are left out."""
        return "".join(self._runs([i for i in token_ids if i in self]))

    def token_bytes(self) -> list[bytes]:
        """UTF-8 of what each id stands for within text; control tokens as they are spelled."""
        spelled = [self._content.get(i, "").encode() for i in range(self.size)]
        for token_id in range(self._num_pieces):
            piece = self._model.id_to_piece(token_id)
            byte = self.byte_ids.get(token_id)
            spelled[token_id] = (
                piece.replace(_SPACE, " ").encode() if byte is None else bytes([byte])
            )
        return spelled

    def _runs(self, token_ids: Sequence[int]) -> Iterator[str]:
        def is_apart(token_id: int) -> bool:
            return token_id in self.special_ids or token_id >= self._num_pieces

        for apart, run in itertools.groupby(token_ids, is_apart):
            if apart:
                yield "".join(self._content[token_id] for token_id in run)
            else:
                yield self._model.decode(list(run))

    def _pattern(self) -> re.Pattern[str] | None:
        """Finds the added tokens that are text but not among the model's pieces."""
        outside = [
            content
            for content, token_id in self.added.items()
            if token_id >= self._num_pieces and token_id not in self.special_ids
        ]
        if not outside:
            return None
        longest_first = sorted(outside, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _classify(piece: Any, special: set[str]) -> None:
    """Takes control tokens out of reach of text. Digits are user-defined pieces as well and stay;
    a control token is bracketed, should no file name it."""
    is_bracketed = piece.piece.startswith("<") and piece.piece.endswith(">")
    if piece.type == _PIECE.USER_DEFINED and (is_bracketed or piece.piece in special):
        piece.type = _PIECE.CONTROL


def _added_tokens(directory: Path, pieces: dict[str, int]) -> tuple[dict[str, int], set[str]]:
    """Spelling -> id, and the spellings that are special, from the files beside the model."""
    config = Section.load_optional(directory / "tokenizer_config.json")
    special_map = Section.load_optional(directory / "special_tokens_map.json")
    special = {*_spellings(config.values), *_spellings(special_map.values)}
    listed = Section.load_optional(directory / "added_tokens.json").values
    ids = {content: token_id for content, token_id in listed.items() if type(token_id) is int}
    for token_id, entry in config.section("added_tokens_decoder").values.items():
        if isinstance(entry, dict) and token_id.isdecimal() and entry.get("content"):
            ids[entry["content"]] = int(token_id)
            if entry.get("special"):
                special.add(entry["content"])
    ids |= {content: pieces[content] for content in special if content in pieces}
    return ids, special


def _spellings(values: dict[str, Any]) -> Iterator[str]:
    """Contents of `bos_token` and its kin and of the lists of further special tokens."""
    for key, value in values.items():
        if not key.endswith(("_token", "special_tokens")):
            continue
        is_named = isinstance(value, dict) and "content" not in value
        entries = list(value.values()) if is_named else value
        for entry in entries if isinstance(entries, list) else [entries]:
            content = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(content, str) and content:
                yield content
