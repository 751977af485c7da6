"""A lock that ends with its process, however it ends: the system holds it, not the file's being there."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


@contextlib.contextmanager
def lock_file(path: pathlib.Path, when_taken: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `path`, which is created and stays; one process at a time does.

    Args:
      path: of a file of its own, in a folder that exists.
      when_taken: called with who holds it ('process 12 on host') if another does; it raises, or the lock is waited for.

    Raises:
      OSError: the file cannot be created or written.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            when_taken(file.read().strip() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; start no second process there", path.parent)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
