"""What a user sees of a command: log lines, progress bars, and how it ends."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from absl import logging as absl_logging
from tqdm import tqdm

from cxa_jax.errors import UserError
from cxa_jax.interruption import RESUMABLE, Interrupted, end_on_signal

_quiet = False


class _Handler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Show the package's log from INFO up, and errors of the others."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax and TFDS tell a lot
    # A save that fails is told in one message by `Checkpoints`; orbax prints a traceback from each of its threads.
    absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    logger = logging.getLogger("cxa_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Handler())


def be_quiet() -> None:
    """Show warnings alone, and no bars: another process speaks for this one."""
    global _quiet
    _quiet = True
    logging.getLogger("cxa_jax").setLevel(logging.WARNING)


@contextlib.contextmanager
def command_exits() -> Iterator[None]:
    """End the process after the body with the status a command has.

    0: done. 1: one message says what to change. 75: a signal stopped it, and the same command goes on.
    """
    try:
        with end_on_signal():
            yield
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no such folder
        sys.exit(f"error: {error}")
    except Interrupted as notice:
        print(f"stopped by {notice}; the same command goes on (exit status {RESUMABLE})", file=sys.stderr)
        sys.exit(RESUMABLE)


def shorten_traceback(error: Exception) -> str:
    """Return an error's message in lines; of a traceback it quotes, the first and the last: what went wrong."""
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
    return "\n  ".join(lines if "Traceback" not in str(error) else [lines[0], lines[-1]])


def progress_bar(total: int, description: str, *, initial: int = 0, disable: bool = False, unit: str = "img") -> tqdm:
    """Return a bar over images with rate and time to go; redrawn twice a minute where the output is no terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        disable=disable or _quiet,
    )
