"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replace_when_written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a neighbour of `path` to write to; it becomes `path` at the end, or goes if the writing fails."""
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield neighbour
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)
