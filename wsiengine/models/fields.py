"""Reading one JSON object field by field: every wrong entry is named in words, and nothing is left over unread."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wsiengine.errors import CardError

_MISSING: Any = object()
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
SLUG_WORDS = "letters, digits, '.', '-', '_' or '+', beginning with a letter or digit"
_KINDS = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def kind_of(value: Any) -> str:
    return "null" if value is None else f"{_KINDS.get(type(value), 'something else')} ({value!r:.60})"


class Fields:
    """A JSON object being read; ``where`` is its place in the file, for messages.

    Every method takes one key out and raises CardError where it is missing (and has no default) or wrong;
    ``finish`` complains of keys that nobody asked for.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise CardError(f"{where} is {kind_of(data)}, needed an object {{…}}", hint="see docs/cards.md")
        self.where = where
        self._left = dict(data)
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return self._left.get(key) is not None

    def take(self, key: str, default: Any = _MISSING) -> Any:
        self._asked.add(key)
        value = self._left.pop(key, default)
        if value is _MISSING:
            raise CardError(f"{self.where}: {key} is missing", hint=self._near(key) or "see docs/cards.md")
        return value

    def finish(self) -> None:
        if self._left:
            key = min(self._left)
            near = difflib.get_close_matches(key, self._asked, 1)
            raise CardError(
                f"{self.where}: unknown entry {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"known entries: {', '.join(sorted(self._asked))}",
            )

    def mapping(self) -> dict[str, Any]:
        """All of it, unchecked (evidence, precision, recipe steps: read by others)."""
        return dict(self._left)

    def text(self, key: str, default: str = _MISSING) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or (default is _MISSING and not value.strip()):
            raise self._wrong(key, value, "text")
        return value

    def text_or_none(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else self.take(key, None)

    def name(self, key: str) -> str:
        """Text that may stand in a QuPath class: ':' separates derived classes there, and a line is one class."""
        value = self.text(key)
        if value != value.strip() or not value.isprintable() or ":" in value:
            raise CardError(
                f"{self.where}: {key} is {value!r}, needed one printable line without ':' or spaces at its ends",
                hint="QuPath reads ':' as the border between a class and its derived class",
            )
        return value

    def slug(self, key: str) -> str:
        """Text fit for a command line and a file name."""
        value = self.text(key)
        if not SLUG.fullmatch(value):
            raise self._wrong(key, value, SLUG_WORDS)
        return value

    def choice(self, key: str, allowed: Sequence[str], default: str = _MISSING) -> str:
        value = self.take(key, default)
        if value not in allowed:
            raise self._wrong(key, value, " or ".join(allowed))
        return value

    def integer(self, key: str, *, at_least: int, default: int = _MISSING) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self._wrong(key, value, f"a whole number of at least {at_least}")
        return value

    def flag(self, key: str, *, default: bool = _MISSING) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def number(self, key: str, *, low: float = -math.inf, high: float = math.inf, default: float = _MISSING) -> float:
        value = self.take(key, default)
        if not _is_number(value) or not low <= value <= high:
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}" if math.isfinite(low) else "a number")
        return float(value)

    def numbers_or_none(self, key: str, count: int) -> tuple[float, ...] | None:
        value = self.take(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
            raise self._wrong(key, value, f"{count} numbers in a list")
        return tuple(float(v) for v in value)

    def positive_pair(self, key: str) -> tuple[float, float]:
        """One number above 0 for both axes, or a list [y, x]."""
        value = self.take(key)
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(_is_number(v) and v > 0 for v in pair):
            raise self._wrong(key, value, "a number above 0, or [y, x]")
        return float(pair[0]), float(pair[1])

    def object(self, key: str) -> "Fields":
        return Fields(self.take(key), f"{self.where}: {key}")

    def object_or_none(self, key: str) -> "Fields | None":
        return self.object(key) if self.has(key) else self.take(key, None)

    def objects(self, key: str, *, at_least: int = 0, default: Sequence[Mapping] = _MISSING) -> list["Fields"]:
        value = self.take(key, default)
        if not isinstance(value, list | tuple) or len(value) < at_least:
            raise self._wrong(key, value, f"a list of at least {at_least} objects")
        return [Fields(entry, f"{self.where}: {key}[{i}]") for i, entry in enumerate(value)]

    def _wrong(self, key: str, value: Any, needed: str) -> CardError:
        return CardError(f"{self.where}: {key} is {kind_of(value)}, needed {needed}", hint="see docs/cards.md")

    def _near(self, key: str) -> str | None:
        near = difflib.get_close_matches(key, self._left, 1)
        return f"the card has {near[0]!r}: is it that?" if near else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
