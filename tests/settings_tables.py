"""The tables of settings in docs/operations.md, made from the settings classes.

python tests/settings_tables.py writes them anew.
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chiasm.config import ProcessSettings, ServiceSettings
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.expert_pool.config import ExpertPoolSettings
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.vision_encoder.config import EncoderSettings

DOCUMENT = Path(__file__).parents[1] / "docs/operations.md"

CLASSES: dict[type[ProcessSettings], type[ProcessSettings] | None] = {
    ServiceSettings: None,
    GatewaySettings: ServiceSettings,
    EncoderSettings: ServiceSettings,
    DecoderSettings: ServiceSettings,
    ExpertPoolSettings: ServiceSettings,
    OrchestratorSettings: ProcessSettings,
}
"""Classes with a table, and the one whose fields are not repeated in it."""

_MARKED = r"<!-- settings: {name} -->\n.*?<!-- end -->\n"


def table(cls: type[ProcessSettings]) -> str:
    """The table of a class in Markdown, between its marks."""
    base = CLASSES[cls]
    inherited = base.model_fields if base is not None else {}
    rows = [
        f"| `--{name.replace('_', '-')}` | {_values(field)} | {_default(field)} "
        f"| {field.description} |"
        for name, field in cls.model_fields.items()
        if name not in inherited
    ]
    head = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    lines = [f"<!-- settings: {cls.__name__} -->", *head, *rows, "<!-- end -->", ""]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with every table as it should be. Raises ValueError where one has no place."""
    for cls in CLASSES:
        places = re.findall(_MARKED.format(name=cls.__name__), text, re.DOTALL)
        if len(places) != 1:
            raise ValueError(f"{DOCUMENT.name} has {len(places)} places for {cls.__name__}")
        text = text.replace(places[0], table(cls))
    return text


def _values(field: FieldInfo) -> str:
    """What may be given: the words of a choice, otherwise the type and its bounds."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0] if kinds and get_origin(field.annotation) is not Literal else field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(f"`{word}`" for word in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="))
        if hasattr(rule, name)
    ]
    return " ".join([_name(kind), ", ".join(bounds)]).strip()


def _name(kind: object) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "yes or no", Path: "path"}
    return names[kind]  # type: ignore[index] # a new type of setting should fail here


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == "":
        return "unset"
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return f"`{field.default}`"


def main() -> None:
    """Rewrites the document."""
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
