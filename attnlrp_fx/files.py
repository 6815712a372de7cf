"""Files that are written whole or not at all."""

import os
import uuid
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write beside ``path`` and rename: readers see the old file or the new one, never a part.

    Text is written in UTF-8. The temporary file is opened by name, not by `tempfile`, so that it
    gets the permissions that any new file of the user's gets.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    goal = Path(path).resolve()
    draft = goal.with_name(f".{goal.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, goal)
    finally:
        draft.unlink(missing_ok=True)
