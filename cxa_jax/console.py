"""What a user sees while a command runs: log lines and progress bars."""

import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm

_quiet = False


class _Handler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Show the package's log from INFO up, and errors of the others."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax and TFDS tell a lot
    logger = logging.getLogger("cxa_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Handler())


def be_quiet() -> None:
    """Show warnings alone, and no bars: another process speaks for this one."""
    global _quiet
    _quiet = True
    logging.getLogger("cxa_jax").setLevel(logging.WARNING)


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
