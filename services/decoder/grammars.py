"""Grammars as automata that say which token may come next; the work is llguidance's."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.services.decoder.vocabulary import load_vocabulary

FIELD = "sampling.response_format"
MAX_GRAMMAR_BYTES = 1 << 20
"""Bound of a grammar in llguidance's notation, in which a source may grow by its escapes."""

_NUM_HELD = 32
_MAX_ERROR_CHARS = 256


class Matcher:
    """One answer's way through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def fresh(self) -> Matcher:
        """An independent copy in the same state."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def push(self, token_id: int) -> None:
        """Takes a token of the answer. Raises InvalidArgument when the grammar's bounds do not
        suffice, or refuse it."""
        self._matcher.consume_token(token_id)
        check(self._matcher)

    def allowed(self) -> torch.Tensor:
        """Whether each token may come next, bool [V]; end-of-sequence where the grammar may end.

        Raises InvalidArgument as `push`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        check(self._matcher)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))


class Grammars:
    """Makes matchers for one checkpoint's tokenizer. Keeps the last few grammars compiled.

    Nothing is loaded before the first grammar comes. Safe to call from any thread; the first call
    takes about a second for a large vocabulary, so not from an event loop.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory, self._config = directory, config
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()

    def matcher(self, grammar: str) -> Matcher:
        """A matcher in its first state. Raises InvalidArgument for a grammar that is none."""
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > _NUM_HELD:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].fresh()

    def _compile(self, grammar: str) -> Matcher:
        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(self._directory, self._config)
        matcher = LLMatcher(
            self._vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        check(matcher)
        return Matcher(matcher, self._config.text.vocab_size)


def check(matcher: LLMatcher) -> None:
    """Raises InvalidArgument when the matcher has failed."""
    if matcher.is_error():
        raise errors.InvalidArgument(FIELD, matcher.get_error()[:_MAX_ERROR_CHARS])
