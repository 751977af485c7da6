"""The networks that come with the repository: a name for each file of weights/, and the digest it must have.

Beside `weights/NAME.safetensors` stands `weights/NAME.json`, which `--mode=export` writes with it: the file's SHA-256
and what the network says of three phantoms.
"""

import hashlib
import json
import pathlib

from cxa_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "weights"
SUFFIX = ".safetensors"


def list_names() -> list[str]:
    """Return the names of the networks that are here."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_weights(weights: str, named: str = "--weights") -> pathlib.Path:
    """Return the weights file or workdir that a name or a path stands for; a name goes before a path.

    Args:
      weights: a name of `list_names`, a weights file or a workdir.
      named: the flag or field that gave it, for messages.

    Raises:
      UserError: it is none of them, or the file of a name is missing or not the one that its digest is of.
    """
    names = list_names()
    if weights in names:
        return _find_named(weights)
    path = pathlib.Path(weights).expanduser().absolute()
    if weights and path.exists():
        return path
    known = f"one of the names {', '.join(names)}" if names else f"a name (there are none in {FOLDER})"
    raise UserError(f"{named}={weights} is no file and no folder: give {known}, a {SUFFIX} file or a workdir")


def _find_named(name: str) -> pathlib.Path:
    path = FOLDER / f"{name}{SUFFIX}"
    if not path.is_file():
        raise UserError(f"{path} is missing: take it from the repository again")
    expected, found = read_reference(path)["sha256"], digest_file(path)
    if found != expected:
        raise UserError(
            f"{path} is not the file that {path.with_suffix('.json').name} describes: its SHA-256 is {found}, not "
            f"{expected}. Take both from the repository again"
        )
    return path


def read_reference(path: pathlib.Path) -> dict:
    """Return what stands in the JSON file beside a weights file: 'sha256' and 'phantoms'.

    Raises:
      UserError: it is not there, or is damaged.
    """
    beside = path.with_suffix(".json")
    try:
        reference = json.loads(beside.read_text(encoding="utf-8"))
        return {"sha256": str(reference["sha256"]), "phantoms": dict(reference["phantoms"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{beside} cannot be read ({error!r}): take it from the repository again") from error


def digest_file(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
