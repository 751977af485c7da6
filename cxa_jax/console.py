"""Progress on the console."""

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """Return a bar over images with rate and time to go; redrawn twice a minute where the output is no terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="img",
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        disable=disable,
    )
