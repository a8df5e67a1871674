"""Typed reads of a JSON object from a file that anyone may have written."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from penstock_runtime.model.errors import ModelConfigError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_CONFIG_BYTES = 16 * 1024 * 1024
"""A config.json is a few kilobytes; a larger one is not a configuration."""


class Fields:
    """The fields of a JSON object. Errors name the file and the field.

    A field that is null counts as absent. Every method raises ModelConfigError when the field has
    the wrong type, is out of range, or is absent and has no default.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    @classmethod
    def from_file(cls, path: Path) -> Fields:
        """Read a JSON object. Raises ModelConfigError."""
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise ModelConfigError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes")
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelConfigError(
                f"cannot read {path}: {error.strerror}; give a directory in Hugging Face format"
            ) from error
        except ValueError as error:
            raise ModelConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelConfigError(f"{path} is not a JSON object")
        return cls(values, str(path))

    def error(self, name: str, problem: str) -> ModelConfigError:
        """Return an error about one field."""
        return ModelConfigError(f"{self._where}: {name} {problem}")

    def get(self, name: str) -> Any:
        """Return the raw value, None if absent."""
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer of at least `minimum`."""
        value = self._present(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"is {value!r}, expected an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive, finite number."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"is {value!r}, expected a number")
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, f"is {value!r}, expected a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return a positive number, or None if absent."""
        return None if self.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, expected true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._present(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"is {value!r}, expected a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an integer or a list of integers as a tuple; empty if absent."""
        value = self.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self.error(name, f"is {value!r}, expected integers")
        return tuple(values)

    def nested(self, name: str) -> Fields:
        """Return an object's fields; no fields if absent."""
        value = self.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(name, f"is {value!r}, expected an object")
        return Fields(value, f"{self._where}: {name}")

    def _present(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value
