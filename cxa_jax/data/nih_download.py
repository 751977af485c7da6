"""The NIH ChestX-ray14 download: where its files lie, and which they are."""

import collections
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from cxa_jax.data import images
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

URL = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
BOX_FILE = "BBox_List_2017.csv"


@dataclasses.dataclass(frozen=True)
class Download:
    """Where the parts of a download lie; `images` maps a file name to every place that has it, sorted."""

    label_file: pathlib.Path
    box_file: pathlib.Path
    lists: dict[str, pathlib.Path]  # 'train_val', 'test'
    images: dict[str, list[pathlib.Path]]


def parse_folders(manual_dir: str) -> list[pathlib.Path]:
    """Return the folders of config.data.manual_dir: one, or several separated by a comma or the system's separator.

    Raises:
      UserError: if none is given or one is not there.
    """
    if not manual_dir:
        raise UserError(f"set --config.data.manual_dir to the folder of the NIH download ({URL})")
    whole = pathlib.Path(manual_dir).expanduser()
    parts = [part for part in re.split(f"[,{os.pathsep}]", manual_dir) if part.strip()]
    folders = [whole] if whole.is_dir() else [pathlib.Path(part.strip()).expanduser() for part in parts]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"config.data.manual_dir: {folder} is not a folder")
    return folders


def find_download(folders: Sequence[pathlib.Path]) -> Download:
    """Find the label file, boxes, lists and PNGs at any depth below `folders`.

    Of the two label files v2020 is preferred. Identical copies of a file count as one.

    Raises:
      UserError: if a part is missing, or several different files claim to be the same part.
    """
    where = ", ".join(map(str, folders))
    found = collections.defaultdict(list)
    pngs = collections.defaultdict(list)
    for path in sorted(_walk(folders)):
        if path.suffix == ".png":
            pngs[path.name].append(path)
        elif path.name.startswith("Data_Entry_2017") and path.suffix == ".csv":
            found[read_label_version(path)].append(path)
        else:
            found[path.name].append(path)
    if not pngs:
        packed = any(name.startswith("images") and ".tar" in name for name in found)
        raise UserError(f"no PNG below {where}" + ("; unpack the images_*.tar.gz files first" * packed))
    label_name = "v2020" if found["v2020"] else "2017"
    if found["v2020"] and found["2017"]:
        log.info("both label files are there: %s is used, not %s", found["v2020"][0], found["2017"][0])
    return Download(
        label_file=_only(found[label_name], "Data_Entry_2017_v2020.csv", where),
        box_file=_only(found[BOX_FILE], BOX_FILE, where),
        lists={part: _only(found[name], name, where) for part, name in LISTS.items()},
        images=dict(pngs),
    )


def choose_file(places: Sequence[pathlib.Path]) -> pathlib.Path:
    """Return the first of the places that hold an image; raises UserError if their sizes in px differ."""
    if len(places) > 1 and len(sizes := {images.measure_image(path) for path in places}) > 1:
        raise UserError(
            f"{places[0].name} is there in several sizes {sorted(sizes)}: {', '.join(map(str, places))}; "
            "give config.data.manual_dir the folder of one size only"
        )
    return places[0]


def fingerprint(download: Download, paths: Mapping[str, pathlib.Path]) -> dict[str, str | int]:
    """Return what identifies the files a data set is made from.

    Args:
      download: The label file, lists and boxes: identified by their SHA-256.
      paths: The chosen file of each image name: identified by names and lengths in bytes, which tell two copies of the
        images apart without reading 42 GB.
    """
    lengths = "\n".join(f"{name} {paths[name].stat().st_size}" for name in sorted(paths))
    return {
        "label_file": download.label_file.name,
        "label_sha256": _hash_file(download.label_file),
        "box_sha256": _hash_file(download.box_file),
        **{f"{part}_list_sha256": _hash_file(path) for part, path in download.lists.items()},
        "num_images": len(paths),
        "image_names_and_lengths_sha256": hashlib.sha256(lengths.encode()).hexdigest(),
    }


def read_label_version(path: pathlib.Path) -> str:
    """Return '2017' or 'v2020'. File names differ from mirror to mirror; only 2017's header ends in a comma."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return "2017" if file.readline().rstrip().endswith(",") else "v2020"


def name_first(names: Sequence[str], number: int = 5) -> str:
    """Return the first names of many, for a message."""
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")


def _walk(folders: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
    seen = set()  # real folders: links may form a loop, and given folders may lie in one another
    for folder in folders:
        for root, subfolders, names in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(root)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            yield from (pathlib.Path(root, name) for name in names if not name.startswith("."))


def _only(paths: Sequence[pathlib.Path], name: str, where: str) -> pathlib.Path:
    if not paths:
        raise UserError(f"no {name} below {where}; it is part of the NIH download ({URL})")
    if len(paths) > 1 and len({_hash_file(path) for path in paths}) > 1:
        raise UserError(f"several different files could be {name}: {', '.join(map(str, paths))}; keep one of them")
    return paths[0]


def _hash_file(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
