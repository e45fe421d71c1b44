"""Typed reading of JSON objects: every complaint names the file and the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chiasm.errors import InvalidArgument, NotFound

_MAX_FILE_BYTES = 64 << 20
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Section:
    """One JSON object of a file; `path` is how errors name it, as `config.json:vision_config`."""

    path: str
    values: dict[str, Any]

    @classmethod
    def load(cls, file: Path) -> Section:
        """Raises NotFound when the file is missing, InvalidArgument when it holds no object."""
        if not file.is_file():
            raise NotFound(f"{file} does not exist", reason="FILE_NOT_FOUND")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidArgument(file.name, f"is larger than {_MAX_FILE_BYTES} bytes")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(file.name, f"is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidArgument(file.name, "must hold a JSON object")
        return cls(file.name, values)

    @classmethod
    def load_optional(cls, file: Path) -> Section:
        """The file's object, or an empty one when there is no such file."""
        return cls.load(file) if file.is_file() else cls(file.name, {})

    def error(self, key: str, message: str) -> InvalidArgument:
        """The error that names this file and `key`."""
        return InvalidArgument(f"{self.path}:{key}", message)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def section(self, key: str) -> Section:
        """A nested object; empty when absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return Section(f"{self.path}:{key}", value)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_INT
    ) -> int:
        """An integer in low..high."""
        value = self._value(key, default)
        if not _is_int(value) or not low <= value <= high:
            raise self.error(key, f"must be an integer in {low}..{high}, not {value!r}")
        return int(value)

    def integers(self, key: str, default: list[int] | None = None, *, low: int = 1) -> list[int]:
        """A list of integers; a scalar is a list of one."""
        value = self._value(key, default)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(_is_int(v) and low <= v <= _MAX_INT for v in listed):
            raise self.error(key, f"must hold integers in {low}..{_MAX_INT}, not {value!r}")
        return cast("list[int]", listed)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"must be finite and above zero, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def require(self, key: str, supported: object) -> None:
        """Refuses a key that is set to anything but the one supported value."""
        if self.has(key) and self.values[key] != supported:
            raise self.error(key, f"only {supported!r} is supported, not {self.values[key]!r}")

    def _value(self, key: str, default: object) -> Any:
        if self.has(key):
            return self.values[key]
        if default is None:
            raise self.error(key, "is missing")
        return default


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
