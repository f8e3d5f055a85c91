"""Typed access to the JSON files of a checkpoint. A wrong field is an ArtifactError that names
file, key and value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.engine.errors import ArtifactError

MAX_FILE_BYTES = 64 << 20
LEAST, MOST = 1e-20, 1e20  # of numbers: what is computed from them stays finite in fp32


class Fields:
    """A JSON object whose fields are read by name and type; null counts as absent."""

    def __init__(self, file: str, values: dict[str, Any]) -> None:
        self.file = file
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __bool__(self) -> bool:
        return bool(self._values)

    def says(self, key: str) -> bool:
        """Whether the key is there, be it with null."""
        return key in self._values

    def raw(self, key: str) -> Any:
        """The value as JSON has it; None if absent."""
        return self._values.get(key)

    def refuse(self, key: str, because: str) -> ArtifactError:
        """The error for this field, naming its value."""
        return ArtifactError(f"{self.file}: {key} is {_shown(self._values.get(key))}; {because}")

    def only(self, key: str, *allowed: Any) -> None:
        """Raise ArtifactError unless the field is absent or one of the values that are
        supported."""
        value = self._values.get(key)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            words = " or ".join(json.dumps(a) for a in allowed)
            raise self.refuse(key, f"only {words} is supported")

    def only_keys(self, *keys: str) -> None:
        """Raise ArtifactError for a key, be it null, that is none of these and does not begin with
        an underscore."""
        for key in self._values:
            if key not in keys and not key.startswith("_"):
                raise self.refuse(key, "this key is not supported here")

    def renamed(self, names: Mapping[str, str]) -> "Fields":
        """The same object with some keys under other names. Raises ArtifactError if both are there
        and differ."""
        values = dict(self._values)
        for old, new in names.items():
            if old in self:
                if new in self and values[new] != values[old]:
                    raise self.refuse(old, f"{new} is {_shown(values[new])}")
                values[new] = values[old]
            values.pop(old, None)
        return Fields(self.file, values)

    def with_values(self, values: Mapping[str, Any]) -> "Fields":
        """The same object with these values, whatever it said."""
        return Fields(self.file, {**self._values, **values})

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Fields":
        """The same object with values for keys that are absent (not for those that are null)."""
        return Fields(self.file, {**defaults, **self._values})

    def whole(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1
    ) -> int:
        """A whole number in low..high; without a default it must be there."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, f"it must be a whole number in {low}..{high}")
        return value

    def real(
        self, key: str, default: float | None = None, *, low: float = LEAST, high: float = MOST
    ) -> float:
        """A number in low..high; without a default it must be there."""
        value = self._present(key, default)
        if not _is_real(value, low, high):
            raise self.refuse(key, f"it must be a number in {low:g}..{high:g}")
        return float(value)

    def whole_list(self, key: str) -> list[int]:
        """Whole numbers from 0 on; none if absent."""
        value = self._values.get(key)
        values = [] if value is None else value
        if not isinstance(values, list) or any(type(n) is not int or n < 0 for n in values):
            raise self.refuse(key, "it must be a list of whole numbers from 0 on")
        return values

    def real_list(self, key: str) -> list[float]:
        """Positive numbers; it must be there."""
        values = self._present(key, None)
        if not isinstance(values, list) or not values:
            raise self.refuse(key, "it must be a list of numbers")
        if not all(_is_real(value, LEAST, MOST) for value in values):
            raise self.refuse(key, f"its numbers must be in {LEAST:g}..{MOST:g}")
        return [float(x) for x in values]

    def choice(self, key: str, *options: str) -> str:
        """One of the options; it must be there."""
        value = self._present(key, None)
        if not isinstance(value, str) or value not in options:
            raise self.refuse(key, f"supported are {', '.join(options)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "it must be true or false")
        return value

    def table(self, key: str) -> "Fields":
        """A nested object; an empty one if absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(key, "it must be an object")
        return Fields(f"{self.file}: {key}", value or {})

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; none if absent."""
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise self.refuse(key, f"token ids must be whole numbers in 0..{vocab_size - 1}")
        return tuple(ids)

    def _present(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ArtifactError(f"{self.file}: {key} is missing")
        return default


def _is_real(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def read_fields(path: Path) -> Fields:
    """Read a JSON object. Raises ArtifactError if the file is missing, unreadable or holds
    something else."""
    try:
        refuse_pipe(path)
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > MAX_FILE_BYTES:
        raise ArtifactError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        raise ArtifactError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: must hold a JSON object")
    return Fields(str(path), values)


def refuse_pipe(path: Path) -> None:
    """Raise ArtifactError for what is there and is no file: a pipe might never be written to."""
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: is not a file")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
