"""What a device that runs out of memory means to a user."""

import contextlib
from collections.abc import Iterator

import jax

from cxa_jax.errors import UserError


@contextlib.contextmanager
def naming_exhaustion(tried: str, cure: str) -> Iterator[None]:
    """Turn the backend's, or the host's, 'out of memory' into one message; every other error passes.

    Args:
      tried: the fields and values that asked for the memory.
      cure: what to change.

    Raises:
      UserError: the device or the host ran out of memory inside.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(f"the host ran out of memory with {tried}: {cure}\n  ({error})") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"the device ran out of memory with {tried}: {cure}\n  ({reason})") from error
