"""The images that a user names: files, folders, patterns and lists of paths, as one list."""

import collections
import csv
import glob
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

from cxa_jax.data.images import DICOM_SUFFIXES, is_dicom
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", *DICOM_SUFFIXES)


def list_inputs(arguments: Sequence[str]) -> list[pathlib.Path]:
    """Expand what stood behind --inputs.

    Args:
      arguments: each a file; a folder (all images below it, sorted; DICOM also without a suffix); a pattern with *, ?,
        [...] or ** for files and folders; or a .csv with a column `path`, relative to its own folder.

    Returns:
      The paths in the order named, each once. A file that does not exist stays in the list: it becomes a row with its
      error.

    Raises:
      UserError: nothing was named, or a CSV cannot be read.
    """
    found: dict[pathlib.Path, None] = {}
    num_named = 0
    for argument in arguments:
        for path in _expand(argument):
            num_named += 1
            found.setdefault(path)
    if not found:
        named = ", ".join(arguments) or "nothing"
        raise UserError(f"no images in {named}: --inputs takes files, folders, patterns, and CSVs of paths")
    if num_named > len(found):
        log.info("%d of %d inputs were named more than once; each is read once", num_named - len(found), num_named)
    return list(found)


def _expand(argument: str) -> Iterator[pathlib.Path]:
    path = pathlib.Path(os.path.expanduser(argument))  # pathlib's own raises where there is no such user
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # a name too long to be one: reading it says so
        is_folder, is_there = False, True
    if is_folder:
        yield from list_folder(path)
    elif path.suffix.lower() == ".csv":
        yield from _read_list(path)
    elif not is_there and glob.has_magic(argument):
        for match in map(pathlib.Path, sorted(glob.glob(str(path), recursive=True))):
            yield from list_folder(match) if match.is_dir() else [match]
    else:
        yield path


def list_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the images at any depth below a folder, sorted; log how many other files were passed over."""
    passed_over = collections.Counter()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES or (not path.suffix and is_dicom(path)):
            yield path
        else:
            passed_over[path.suffix or "no suffix"] += 1
    if passed_over:
        kinds = ", ".join(f"{kind} {number}" for kind, number in passed_over.items())
        log.info("%s: passed over %d files that are no images (%s)", folder, passed_over.total(), kinds)


def _read_list(path: pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV of paths: {error}") from error
    if not rows or not all(row.get("path") for row in rows):
        raise UserError(f"{path} needs a column `path` with a path in every row")
    for row in rows:
        yield path.parent / os.path.expanduser(row["path"])
