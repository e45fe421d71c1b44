"""Response formats as grammars in llguidance's notation, which the decoders follow."""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLParserLimits

from chiasm import errors
from chiasm.services.gateway.domain import Grammar
from chiasm.v1 import inference_pb2

MAX_SOURCE_BYTES = 64 * 1024

_WHITESPACE = r"[ \n\t]{0,32}"
"""Between the parts of JSON: room to indent, but a model cannot lose itself in blanks."""

_MAX_ERROR_CHARS = 256


def grammar(wire: inference_pb2.ResponseFormat, path: str) -> Grammar:
    """The grammar of a format, its source bounded but not compiled yet.

    Raises InvalidArgument with a field below `path`.
    """
    form = wire.WhichOneof("form")
    match form:
        case "json_schema":
            _bound(len(wire.json_schema.encode()), f"{path}.json_schema")
            source = _json(wire.json_schema, f"{path}.json_schema")
        case "json_object":
            if not wire.json_object:
                raise errors.InvalidArgument(f"{path}.json_object", "must be true if it is set")
            source = _json('{"type": "object"}', f"{path}.json_object")
        case "regex":
            if not wire.regex:
                raise errors.InvalidArgument(f"{path}.regex", "the expression is empty")
            _bound(len(wire.regex.encode()), f"{path}.regex")
            source = LLMatcher.grammar_from_regex(wire.regex)
        case "choice":
            _bound(wire.choice.ByteSize(), f"{path}.choice.texts")  # before any is looked at
            texts = wire.choice.texts
            if not texts or not all(texts):
                raise errors.InvalidArgument(
                    f"{path}.choice.texts", "there must be texts, and none of them empty"
                )
            spelled = " | ".join(json.dumps(text) for text in texts)
            source = LLMatcher.grammar_from_lark(f"start: {spelled}")
        case _:
            raise errors.InvalidArgument(
                path, "one of json_schema, json_object, regex and choice must be set"
            )
    return Grammar(source=source, field=f"{path}.{form}")


def check(value: Grammar) -> None:
    """Compiles the grammar. Raises InvalidArgument. May take a while: not for an event loop."""
    limits = LLParserLimits(verbose_errors=False)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(value.source, limits=limits)
    if is_error:
        raise errors.InvalidArgument(value.field, messages[0][:_MAX_ERROR_CHARS])


def _bound(num_bytes: int, field: str) -> None:
    if num_bytes > MAX_SOURCE_BYTES:
        raise errors.InvalidArgument(field, f"has {num_bytes} bytes, limit {MAX_SOURCE_BYTES}")


def _json(schema: str, field: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise errors.InvalidArgument(field, str(error)[:_MAX_ERROR_CHARS]) from None
