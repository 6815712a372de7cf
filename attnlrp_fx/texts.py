"""The texts of a file, and how many of their tokens a model reads."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from attnlrp_fx.errors import InputError


class Texts:
    """The texts of a file, read line by line whenever they are gone through.

    Args:
        path: lines of JSON if its name ends with ".jsonl" or ".json": texts, or objects; or else
            plain lines. Blank lines do not count.
        column: the key of the text in an object.

    Raises:
        InputError: there is no such file.
    """

    def __init__(self, path: Path, column: str = "text") -> None:
        if not path.is_file():
            what = f"'{path}' is a directory" if path.is_dir() else f"there is no '{path}'"
            raise InputError(what, remedy="name a file with a text a line, or lines of JSON")
        self.path, self.column = path, column
        self.is_json = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
        digest, self._count = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for line in file:
                digest.update(line)
                self._count += bool(line.strip())
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._text(number, line) if self.is_json else line.rstrip("\r\n")

    def some(self, count: int) -> list[str]:
        """That many of them, the first again and again if there are fewer.

        Raises:
            InputError: there are none.
        """
        found = list(islice(self, count))
        if not found:
            raise InputError(f"'{self.path}' holds no texts", remedy="name another file")
        return (found * count)[:count]

    def spans(self, column: str) -> list[tuple[int, int] | None]:
        """Of each text a span of characters, [start, end]; None where it has none.

        Raises:
            InputError: a span is none of its text.
        """
        found: list[tuple[int, int] | None] = []
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = self._row(number, line) if self.is_json else None
                    span = row.get(column) if isinstance(row, dict) else None
                    found.append(None if span is None else self._span(number, line, span))
        return found

    def _span(self, number: int, line: str, span: Any) -> tuple[int, int]:
        length = len(self._text(number, line))
        is_pair = isinstance(span, list) and [type(end) for end in span] == [int, int]
        if not is_pair or not 0 <= span[0] < span[1] <= length:
            raise InputError(
                f"line {number} of '{self.path}' has no span of its text: {span}",
                remedy=f"give [start, end] in characters, 0 <= start < end <= {length}",
            )
        return span[0], span[1]

    def _row(self, number: int, line: str) -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            where = f"line {number} of '{self.path}'"
            raise InputError(f"{where} is no JSON", why=str(error)) from error

    def _text(self, number: int, line: str) -> str:
        where = f"line {number} of '{self.path}'"
        found = self._row(number, line)
        text = found.get(self.column) if isinstance(found, dict) else found
        if not isinstance(text, str):
            has = f"it has: {', '.join(found)}" if isinstance(found, dict) else f"it is {found!r}"
            raise InputError(
                f"{where} has no text '{self.column}'", why=has, remedy="name it with --column"
            )
        return text


class Cut:
    """A tokenizer whose texts have a most number of tokens."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options, truncation=True, max_length=self._length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def longest(model: Any, tokenizer: Any, length: int | None) -> int:
    """How many tokens a text may have, of a model and its tokenizer."""
    read = getattr(model.config, "max_position_embeddings", None) or 2**20
    return min(length or read, read, getattr(tokenizer, "model_max_length", read))
