"""Python's garbage collector, kept from what it cannot help with."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def keeping_garbage() -> Iterator[None]:
    """Stop the collector: importing and tracing make a million small objects, and nearly all of them live on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
