"""Which prompts end within a thought, and which models always think."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from chiasm.model.section import Section
from chiasm.model.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_SWITCH = "enable_thinking"


def thought_end(token_ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """The token that ends the thought in which the prompt breaks off; None if it does not."""
    start, end = tokenizer.token_id(_OPEN), tokenizer.token_id(_CLOSE)
    if start is None or end is None:
        return None
    for token_id in reversed(token_ids):
        if token_id in (start, end):
            return end if token_id == start else None
    return None


def always_thinks(directory: Path) -> bool:
    """Whether the checkpoint's chat template opens a thought and has no switch for it."""
    template = _template(directory)
    return _OPEN in template and _SWITCH not in template


def _template(directory: Path) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        section = Section.load_optional(directory / name)
        if section.has("chat_template"):
            # A list of named templates is searched as a whole.
            return json.dumps(section.values["chat_template"])
    return ""
