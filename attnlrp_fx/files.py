"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write beside ``path`` and rename: readers see the old file or the new one, never a part.

    Text is written in UTF-8.
    """
    with writing_atomically(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


@contextmanager
def writing_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, and to read again, that stands at ``path`` when all went well.

    The temporary file is opened by name, not by `tempfile`, so that it gets the permissions that
    any new file of the user's gets.
    """
    goal = Path(path).resolve()
    draft = goal.with_name(f".{goal.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, goal)
    finally:
        draft.unlink(missing_ok=True)
