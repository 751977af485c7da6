"""Small JSON files of a workdir that predictions read: the same from the folder and from a weights file."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from cxa_jax.errors import UserError

# What a weights file carries of a workdir, where it is there. Each is read by `load...(folder)` of its own module.
COMPANIONS = ("input_statistics.json", "view_classifier.json", "cardiothoracic_ratio.json")


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """One file that a weights file carries: as much of a `pathlib.Path` as readers of companions use.

    Attributes:
      place: says in messages where it lies.
      text: what is in it; None if the weights file has no such file.
    """

    place: str
    text: str | None

    def __str__(self) -> str:
        return self.place

    def is_file(self) -> bool:
        """Return whether the weights file carries it."""
        return self.text is not None

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return what is in it; the encoding is any, since it is text already."""
        del encoding
        if self.text is None:
            raise FileNotFoundError(self.place)
        return self.text


@dataclasses.dataclass(frozen=True)
class StoredFolder:
    """The companion files that a weights file carries, found by `folder / name` as in a workdir.

    Attributes:
      source: the weights file.
      contents: of each companion, by its name.
    """

    source: pathlib.Path
    contents: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.source)

    def __truediv__(self, name: str) -> StoredFile:
        text = json.dumps(self.contents[name]) if name in self.contents else None
        return StoredFile(f"{self.source}: {name}", text)


Folder = pathlib.Path | StoredFolder  # where companions lie


def read_companions(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the contents of each companion that is in a workdir, by its name.

    Raises:
      UserError: one of them is no JSON.
    """
    contents = {}
    for path in (workdir / name for name in COMPANIONS):
        if path.is_file():
            try:
                contents[path.name] = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is damaged ({error}); --mode=evaluate writes it again") from error
    return contents
