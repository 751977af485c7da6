"""Finished runs as a report reads them: from their folders, or from anyone's predictions file."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cxa_jax.errors import UserError
from cxa_jax.localization_table import LocalizationTable, read_localization
from cxa_jax.predictions import PredictionTable, read_predictions
from cxa_jax.saved_maps import SavedMaps, load_maps

CURE = "finish the run, or test its best state again: the run's command with --mode=evaluate"
DEV_FILE = "predictions_dev.csv"
HISTORY = ("epoch", "train_loss", "dev_loss", "dev_auroc")  # what is read of metrics.csv


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run, or one predictions file.

    Attributes:
        name: short and unique in a report.
        path: folder or file.
        test: predictions on test; those of all results of a report are in one order.
        dev: predictions on dev, or None.
        dev_name: what dev is, in words.
        metrics: what metrics.json holds; None for a predictions file.
        boxes: localisation scores, None without boxes.
        maps: pictures and maps, None for a predictions file.
        history: rows of metrics.csv, one an epoch.
        augmentation: the picture of augmented training images (Fig. 3), or None.
        num_left_out: test images that other results of the report do not have.
    """

    name: str
    path: pathlib.Path
    test: PredictionTable
    dev: PredictionTable | None = None
    dev_name: str = "dev"
    metrics: dict[str, Any] | None = None
    boxes: LocalizationTable | None = None
    maps: SavedMaps | None = None
    history: tuple[dict[str, float], ...] = ()
    augmentation: pathlib.Path | None = None
    num_left_out: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The flat config; empty for a predictions file."""
        return self.metrics["config"] if self.metrics else {}

    @property
    def is_phantom(self) -> bool:
        """True if the images are drawn: by metrics.json, or by the ids of a predictions file."""
        return self.metrics["phantom"] if self.metrics else str(self.test.id[0]).startswith("phantom")


def load_results(paths: Sequence[str]) -> list[Result]:
    """Load runs and predictions files, all on the same test images, and bring them into one order.

    A run that was tested on a part of another's images, such as the originals that are at hand at a larger test size,
    brings all runs to that part. Beside a file `NAME_test.csv`, `NAME_dev.csv` is its dev.

    Raises:
        UserError: none given, one given twice, one that is missing or unfinished, phantoms beside X-rays, or other
            test images; the message names them.
    """
    if not paths:
        raise UserError("--workdirs is empty; give folders of finished runs or CSV files, separated by commas")
    places = [pathlib.Path(path).expanduser().absolute() for path in paths]
    doubled = sorted({str(place) for place in places if places.count(place) > 1})
    if doubled:
        raise UserError(f"--workdirs names {', '.join(doubled)} more than once")
    names = _short_names(places)
    results = [_load(place, name) for place, name in zip(places, names, strict=True)]
    phantoms = [result.name for result in results if result.is_phantom]
    if 0 < len(phantoms) < len(results):
        others = [result.name for result in results if not result.is_phantom]
        raise UserError(
            f"--workdirs mixes chest phantoms ({', '.join(phantoms)}) with X-rays of patients ({', '.join(others)}); "
            "make one report for each"
        )
    return _align(results)


def _short_names(places: list[pathlib.Path]) -> list[str]:
    names = [f"{p.parent.name}/{p.name}" if p.name.startswith("eval_") else p.name for p in places]
    names = [name.removesuffix(".csv") for name in names]
    return [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]


def _load(path: pathlib.Path, name: str) -> Result:
    if path.is_file():
        dev = path.with_name("dev".join(path.name.rsplit("test", 1)))
        if "test" not in path.name or not dev.is_file():
            return Result(name, path, read_predictions(path), None, dev.name)
        test, others = read_predictions(path), read_predictions(dev)
        if shared := sorted(set(test.id.tolist()) & set(others.id.tolist())):
            raise UserError(
                f"{dev} and {path} share {len(shared):,} images, such as {shared[0]}: a threshold chosen on test "
                "images says nothing of them; take them out of one file, or rename the first to leave it out"
            )
        return Result(name, path, test, others, dev.name)
    if not path.is_dir():
        raise UserError(f"--workdirs: there is no {path}")
    home = path.parent if path.name.startswith("eval_") else path  # another test size lies in its run's folder
    dev = next((folder for folder in (path, home) if (folder / DEV_FILE).is_file()), None)
    for file in ("metrics.json", "predictions_test.csv"):
        if not (path / file).is_file():
            raise UserError(f"{path} has no {file}: {CURE}")
    if dev is None:
        raise UserError(f"{path} has no {DEV_FILE}: {CURE}")
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'metrics.json'} is no JSON ({error}): {CURE}") from error
    if not (path / "maps_test.npz").is_file() or "strata" not in metrics.get("test", {}):
        raise UserError(f"{path} was tested by an older version: {CURE}")
    picture = home / "augmentation.png"
    boxes = path / "localization_test.csv"
    return Result(
        name,
        path,
        test=read_predictions(path / "predictions_test.csv"),
        dev=read_predictions(dev / DEV_FILE),
        dev_name="dev" if dev == path else name_other_dev(metrics["config"]["data.image_size"]),
        metrics=metrics,
        boxes=read_localization(boxes) if boxes.is_file() else None,
        maps=load_maps(path / "maps_test.npz"),
        history=_read_history(home / "metrics.csv"),
        augmentation=picture if picture.is_file() else None,
    )


def _read_history(path: pathlib.Path) -> tuple[dict[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple({name: float(row[name] or "nan") for name in HISTORY} for row in csv.DictReader(file))


def name_other_dev(image_size: int) -> str:
    """Return what dev is where the images of another test size have none of their own."""
    return f"dev at {image_size} px"


def _align(results: list[Result]) -> list[Result]:
    """Bring all tables to the images that all share, in the order of the table that knows most, whose attributes serve.

    Images may be missing in runs alone, and in one only if another has them all: what a file lacks is a mistake.
    """
    tables = [result.test for result in results]
    knows_most = max(tables, key=lambda table: (table.patient is not None, len(table.attributes)))
    fewest = min((result.test for result in results), key=len)
    reference = knows_most.take(np.isin(knows_most.id, fewest.id))
    order = np.argsort(reference.id)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    aligned = []
    for result in results:
        _check_images(result, results, fewest)
        table = result.test.take(np.isin(result.test.id, reference.id))
        rows = np.argsort(table.id)[back]
        label = table.label[rows]
        differ = label != reference.label
        if differ.any():
            name = results[[table is knows_most for table in tables].index(True)].name
            raise UserError(f"{result.name} and {name} disagree on the label of {reference.id[np.argmax(differ)]}")
        logit = None if table.logit is None else table.logit[rows]
        test = dataclasses.replace(reference, score=table.score[rows], logit=logit)
        boxes = result.boxes and result.boxes.take(np.isin(result.boxes.ids, reference.id))
        left_out = len(result.test) - len(test)
        aligned.append(dataclasses.replace(result, test=test, boxes=boxes, num_left_out=left_out))
    return aligned


def _check_images(result: Result, results: list[Result], fewest: PredictionTable) -> None:
    """Refuse a result that lacks some of `fewest`, and a file that lacks images or has others."""
    for other in results:
        missing = set(other.test.id) ^ set(result.test.id)
        nested = result.metrics and other.metrics and set(fewest.id) <= set(result.test.id)
        if missing and not nested:
            raise UserError(
                f"{result.name} and {other.name} were tested on other images: {len(result.test)} and "
                f"{len(other.test)}, of which {len(missing)} are in one alone, such as {min(missing)}; make one "
                "report for each set of images"
            )
