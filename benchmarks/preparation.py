"""How near --mode=prepare comes to what decoding and resizing the same PNG files takes: interleaved, on the same cores.

    python benchmarks/preparation.py --manual_dir=/path/to/ChestX-ray14,/path/to/images

The given images stand under as many names of the label file as --num_images asks for (links), so that a few originals
are enough. A round is: bare (every file decoded, made grey and resized to --image_size by one process a core, nothing
kept), then `prepare` (which also checks, sorts, hashes and writes). Writes benchmarks/results/preparation.json and .md.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import dense121  # noqa: E402
from cxa_jax.data import chestxray14  # noqa: E402
from cxa_jax.data.parallel import count_cores  # noqa: E402
from cxa_jax.timing import describe_host  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

TARGET = 0.9  # of the bare rate


def decode_and_resize(task: tuple[str, int]) -> int:
    """Do the least that a preparation has to do with a file; return a byte, so that nothing is skipped."""
    path, size = task
    with Image.open(path) as image:
        return image.convert("L").resize((size, size), Image.Resampling.BILINEAR).getpixel((0, 0))


def link_images(manual_dir: str, num_images: int, folder: pathlib.Path) -> list[str]:
    """Link the images below `manual_dir` under `num_images` names of its label file; return the links.

    Training and test names take turns, and cardiomegaly and no finding among them, since every split needs both.
    """
    given = [pathlib.Path(part).expanduser().absolute() for part in manual_dir.split(",")]
    files = sorted(path for part in given for path in part.rglob("*.png"))
    tables = {path.name: path for part in given for path in part.rglob("*") if path.suffix in (".csv", ".txt")}
    with open(tables["Data_Entry_2017_v2020.csv"], encoding="utf-8") as file:
        findings = {row["Image Index"]: row["Finding Labels"] for row in csv.DictReader(file)}
    wanted = {"Cardiomegaly", "No Finding"}
    groups = [
        [name for name in tables[part].read_text().split() if findings[name] == finding]
        for part in ("train_val_list.txt", "test_list.txt")
        for finding in sorted(wanted)
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    names = list(itertools.islice(filter(None, turns), num_images))
    for name, target in zip(names, itertools.cycle(files), strict=False):
        (folder / name).symlink_to(target)
    return [str(folder / name) for name in names]


def measure_bare(paths: list[str], size: int) -> float:
    """Return the seconds that bare decoding and resizing takes on all cores, the start of the processes included."""
    start = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(count_cores()) as pool:
        for _ in pool.imap(decode_and_resize, ((path, size) for path in paths), chunksize=8):
            pass
    return time.perf_counter() - start


def measure_prepare(manual_dir: str, size: int) -> float:
    """Return the seconds of a whole `prepare` into a new folder."""
    with tempfile.TemporaryDirectory() as data_dir:
        config = dense121.get_config()
        config.data.update(name="chestxray14", image_size=size, manual_dir=manual_dir, data_dir=data_dir)
        config.data.allow_missing = True
        start = time.perf_counter()
        chestxray14.prepare(config.data)
        return time.perf_counter() - start


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manual_dir", required=True, help="NIH's tables and some 1024 px images; several, by commas")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--image_size", type=int, default=224, help="px")
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    tables = [part for part in options.manual_dir.split(",") if next(pathlib.Path(part).rglob("*.csv"), None)]
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = link_images(options.manual_dir, options.num_images, pathlib.Path(folder))
        for _ in range(options.num_rounds):
            bare.append(measure_bare(paths, options.image_size))
            whole.append(measure_prepare(",".join([*tables, folder]), options.image_size))
    shares = np.array(bare) / np.array(whole)
    results = {
        "num_images": len(paths), "image_size": options.image_size, "bare_s": bare, "prepare_s": whole,
        "share": float(np.median(shares)), "share_range": [float(shares.min()), float(shares.max())],
        "images_per_s": len(paths) / float(np.median(whole)), "host": describe_host(),
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment()
    environment["command"] = "python benchmarks/preparation.py"
    write_atomically(options.output / "preparation.json", to_json(results | {"environment": environment}))
    text = f"""# Preparation of 1024 px images

{len(paths)} PNG files to {options.image_size} px on {count_cores()} cores, {options.num_rounds} interleaved rounds.

| | s, median | images/s |
|---|--:|--:|
| bare decode + resize | {np.median(bare):.2f} | {len(paths) / np.median(bare):.0f} |
| `prepare` | {np.median(whole):.2f} | {len(paths) / np.median(whole):.0f} |

Share of the bare rate: {np.median(shares):.3f} [{shares.min():.3f}, {shares.max():.3f}] (target: {TARGET}).

Machine: {results["host"]["processor"]}, load {os.getloadavg()[0]:.1f} at the end; commit {environment["commit"]}.
"""
    write_atomically(options.output / "preparation.md", text)
    print(text)


if __name__ == "__main__":
    main()
