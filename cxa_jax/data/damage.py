"""Prepared sets that are damaged: one message with the folder and the cure."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from google.protobuf.json_format import ParseError
from ml_collections import ConfigDict

from cxa_jax.errors import UserError


@contextlib.contextmanager
def naming_damage(data_config: ConfigDict) -> Iterator[None]:
    """Name the prepared set whose description TFDS cannot read, as it says no more than where in the text.

    Raises:
      UserError: a dataset_info.json or metadata.json in config.data.data_dir is damaged.
    """
    try:
        yield
    except (ParseError, UnicodeDecodeError, json.JSONDecodeError) as error:
        folder = pathlib.Path(data_config.data_dir).expanduser()
        damaged = [path.parent for path in sorted(folder.glob("*/*/*/*.json")) if not _is_json(path)]
        raise describe_damage(
            damaged[0] if damaged else folder, f"their description cannot be read ({error})"
        ) from error


def _is_json(path: pathlib.Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def describe_damage(folder: pathlib.Path, reason: str) -> UserError:
    """Return the error that says where, what, and what to do."""
    cure = "Delete this folder and prepare the data again (--mode=prepare)."
    return UserError(f"The prepared data in {folder} are damaged: {reason}. {cure}")
