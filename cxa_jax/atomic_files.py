"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator


@contextlib.contextmanager
def replace_when_written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a neighbour of `path` to write to; it becomes `path` at the end, or goes if the writing fails."""
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield neighbour
        os.replace(neighbour, path)
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    finally:
        neighbour.unlink(missing_ok=True)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Remove the neighbours that killed processes left in `folder`; no other process may be writing there."""
    for path in folder.glob("*.tmp"):
        if re.search(r"\.\d+\.tmp$", path.name):
            path.unlink()
