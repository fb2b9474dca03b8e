"""Typed access to a checkpoint's configuration, whose values may be anything."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 2**12
REQUIRED: Any = object()
"""Default of a field that must be there."""


def is_finite(value: Any) -> bool:
    """Whether it is a number, and one that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not


class ConfigFields:
    """Named values of one file; an error is a ValueError with field, file and what is allowed.

    A null counts as absent, as in transformers.

    Args:
        values: by their names in the file.
        source: the file, for errors.
        names: of fields that the file calls otherwise: the name asked for -> that in the file.
    """

    def __init__(
        self, values: Mapping[str, Any], source: str, names: Mapping[str, str] | None = None
    ) -> None:
        self.values = values
        self.source = source
        self.asked: set[str] = set()
        """Names in the file of all that was asked for."""
        self._names = names or {}

    def __contains__(self, name: str) -> bool:
        return self.values.get(self._names.get(name, name)) is not None

    def integer(
        self, name: str, default: Any = REQUIRED, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> Any:
        value = self.raw(name, default)
        if value is default:
            return value
        if type(value) is not int or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, got {value!r}")
        if value > maximum:
            raise self.error(name, f"must be at most {maximum}, got {value}")
        return value

    def number(self, name: str, default: Any = REQUIRED, positive: bool = True) -> Any:
        value = self.raw(name, default)
        if value is default:
            return value
        allowed = "a finite number above 0" if positive else "a finite number"
        if not is_finite(value) or (positive and value <= 0):
            raise self.error(name, f"must be {allowed}, got {value!r}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.raw(name, default)
        if value is not default and type(value) is not bool:
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def string(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.raw(name, default)
        if value is not default and type(value) is not str:
            raise self.error(name, f"must be a string, got {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; () when absent."""
        value = self.raw(name, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self.error(name, f"must be a token id or a list of token ids, got {value!r}")
        return tuple(ids)

    def raw(self, name: str, default: Any = REQUIRED) -> Any:
        name = self._names.get(name, name)
        self.asked.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.source}: field {name!r} is missing")
        return default

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.source}: field {self._names.get(name, name)!r} {problem}")
