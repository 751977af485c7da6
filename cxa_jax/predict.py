"""A trained run on foreign images: a table, a picture each and contact sheets; bad files become rows, not ends."""

import collections
import csv
import itertools
import logging
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from cxa_jax.cardiothoracic import SOURCE as RATIO_SOURCE
from cxa_jax.cardiothoracic import RatioReader, load_ratio_reader, measure_image
from cxa_jax.console import progress_bar
from cxa_jax.data.door_checks import check_image
from cxa_jax.data.input_files import list_inputs
from cxa_jax.data.input_images import InputImage, read_inputs
from cxa_jax.data.input_statistics import InputStatistics, load_input_statistics
from cxa_jax.data.views import describe_views
from cxa_jax.errors import UserError
from cxa_jax.figures import CLASSES
from cxa_jax.heat_maps import describe_rule, detect_boxes, scale_map, upsample_maps
from cxa_jax.panels import FOOTER, ContactSheets, Prediction, draw_panels
from cxa_jax.sharding import put_batch
from cxa_jax.trained_network import TrainedNetwork, load_trained_network
from cxa_jax.weights import load_weights
from cxa_jax.workdir import describe_environment, flatten_config, to_json, write_atomically

log = logging.getLogger(__name__)

COLUMNS = (
    "path", "logit", "score", "calibrated_score", "cardiothoracic_ratio", "heart_width", "thorax_width", "threshold",
    "threshold_origin", "decision", "box_x", "box_y", "box_w", "box_h", "warnings", "picture", "error",
)  # fmt: skip
BOX = ("box_x", "box_y", "box_w", "box_h")
TABLE, SUMMARY = "predictions.csv", "summary.json"
_MAX_STEM = 60  # characters of a file's name in its picture's: 255 bytes are the most that file systems take


def predict(
    workdir: str | None, inputs: Sequence[str], output: str | None = None, weights: str | None = None
) -> pathlib.Path:
    """Predict foreign images by the best state of `workdir`, or by `weights`.

    Writes `output` (default WORKDIR/predict, or without a workdir runs/predict-NAME): predictions.csv, one row for each
    input in the order named; for each image a picture in panels/; contact sheets; summary.json. The folder has
    '.partial' behind its name until all is in it; what a cut run left there goes.

    Args:
      workdir: of the run; None where `weights` says which network.
      inputs: files, folders, patterns, CSVs of paths (`input_files.list_inputs`).
      output: folder that is not there yet, or is empty.
      weights: a name in weights/, a weights file, or a workdir (`cxa_jax.weights`).

    Returns:
      The folder.

    Raises:
      UserError: no run, or two ways to it, no inputs, something in the way, or, at the very end, files that could not
        be read.
    """
    if workdir and weights:
        raise UserError("--workdir and --weights both say which network predicts: give one of them")
    paths = list_inputs(inputs)
    network = load_weights(weights) if weights else load_trained_network(workdir)
    folder = pathlib.Path(output).expanduser().absolute() if output else _choose_folder(network)
    partial = _open_partial(folder)
    statistics = load_input_statistics(network.folder)
    if statistics is None:
        log.warning("%s has no input_statistics.json, so nothing is compared with its training images; "
                    "--mode=evaluate writes it", network.folder)  # fmt: skip
    log.info("threshold %.4f: %s", network.threshold, network.threshold_origin)
    reader = load_ratio_reader(network.folder)
    counts = _predict_all(network, statistics, reader, paths, partial)
    summary = _summarize(network, statistics, counts) | {"cardiothoracic_ratio": reader and RATIO_SOURCE}
    write_atomically(partial / SUMMARY, to_json(summary))
    partial.rename(folder)  # onto nothing, or an empty folder
    log.info("%d images predicted, %d with warnings; %s, panels/, %d contact sheets in %s. %s",
             counts["predicted"], counts["with_warnings"], TABLE, counts["contact_sheets"], folder, FOOTER)  # fmt: skip
    if counts["errors"]:
        raise UserError(f"{counts['errors']} of {len(paths)} inputs could not be read; see {folder / TABLE}")
    return folder


def _choose_folder(network: TrainedNetwork) -> pathlib.Path:
    """Return where to write if nothing is said: in a workdir, but not beside a weights file, which may be shared."""
    source = network.source
    return source / "predict" if source.is_dir() else pathlib.Path("runs", f"predict-{source.stem}").absolute()


def _open_partial(folder: pathlib.Path) -> pathlib.Path:
    """Create the folder beside `folder` that becomes it at the end; a cut run's, known by its table, is cleared."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; delete it, or choose another folder by --output")
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists() and not (partial / TABLE).is_file():
        raise UserError(f"{partial} is in the way; move it, or choose another folder by --output")
    if partial.exists():
        log.info("clearing %s, which a cut run left", partial)
        shutil.rmtree(partial)
    (partial / "panels").mkdir(parents=True)
    return partial


def _predict_all(
    network: TrainedNetwork,
    statistics: InputStatistics | None,
    reader: RatioReader | None,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
) -> collections.Counter:
    """Write table, pictures and contact sheets; return the counts of summary.json."""
    counts = collections.Counter(predicted=0, errors=0, with_warnings=0, positive=0)
    with (
        # A name that is no UTF-8 is written with its bytes as \xNN.
        (folder / TABLE).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ContactSheets(folder, network.config.eval.overlay_intensity, _remark(network)) as sheets,
        progress_bar(len(paths), "predict") as progress,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number, (item, out) in enumerate(_run(network, paths)):
            row = _make_row(network, statistics, reader, item, out, folder, number, sheets)
            writer.writerow(row)
            counts.update(["errors" if row["error"] else "predicted"])
            counts.update({"with_warnings": bool(row["warnings"]), "positive": row["decision"] == CLASSES[1]})
            progress.update()
    counts["contact_sheets"] = sheets.num_pages
    return counts


def _run(
    network: TrainedNetwork, paths: Sequence[pathlib.Path]
) -> Iterator[tuple[InputImage, dict[str, np.ndarray] | None]]:
    """Yield each input with what the network says of it (None for an unreadable one), in order."""
    batch_size = network.choose_batch_size(len(paths))
    stream = read_inputs(paths, network.image_size, network.config.data.num_workers)
    while items := list(itertools.islice(stream, batch_size)):
        good = [item for item in items if item.image is not None]
        images = np.zeros((batch_size, network.image_size, network.image_size, 1), np.uint8)
        for row, item in enumerate(good):
            images[row, ..., 0] = item.image.pixels
        out = {}
        if good:
            device = network.eval_step(network.variables, put_batch(images, network.mesh))
            out = {name: np.asarray(device[name]) for name in ("logit", "attention", "evidence")}
        row = itertools.count()
        for item in items:
            i = None if item.image is None else next(row)
            yield item, None if i is None else {name: values[i] for name, values in out.items()}


def _make_row(
    network: TrainedNetwork,
    statistics: InputStatistics | None,
    reader: RatioReader | None,
    item: InputImage,
    out: dict[str, np.ndarray] | None,
    folder: pathlib.Path,
    number: int,
    sheets: ContactSheets,
) -> dict[str, Any]:
    """Return the row of one input, and draw it."""
    row = dict.fromkeys(COLUMNS, "") | {"path": str(item.path), "error": item.error}
    name = f"{number:05d} {item.path.name}"
    if out is None:
        sheets.add_error(name)
        return row
    logit = float(out["logit"])
    if not np.isfinite(logit):
        sheets.add_error(name)
        return row | {"error": "the network's output is not a finite number"}
    score = float(expit(logit))
    decision = CLASSES[int(score >= network.threshold)]
    heat, box = locate(network, out)
    box = box if decision == CLASSES[1] else None
    found = check_image(item.image, statistics)
    if reader is not None:
        widths, fault = measure_image(reader, item.image.pixels, item.image.width)
        row |= widths
        found += fault
    stem = item.path.stem[:_MAX_STEM].encode("utf-8", "replace").decode("utf-8")  # a name may be no text
    picture = f"panels/{number:05d}_{stem}.png"
    row |= {"logit": repr(logit), "score": repr(score), "threshold": repr(network.threshold), "decision": decision}
    row |= {"threshold_origin": network.threshold_origin, "warnings": "; ".join(found), "picture": picture}
    if network.calibration is not None:
        row["calibrated_score"] = repr(float(network.calibration.apply(logit)))
    if box is not None:
        scale = np.array([item.image.width, item.image.height] * 2) / network.image_size
        row |= {name: f"{value:.1f}" for name, value in zip(BOX, box * scale, strict=True)}
    shown = _make_prediction(network, item, name, heat, box, score, found, row["cardiothoracic_ratio"])
    image = draw_panels(shown, _map_name(network), network.config.eval.overlay_intensity, _remark(network))
    image.save(folder / picture, compress_level=3)  # a tenth larger than by default, in half the time
    sheets.add(shown)
    return row


def locate(network: TrainedNetwork, out: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the map [S, S] in [0, 1] and its box x, y, w, h in px of the network's frame, None where it has none.

    The map is attention on its fixed scale; for networks without any, positive class evidence over its maximum. The box
    is cut by `network.box_rule`, which may scale the map in its own way.
    """
    name, scaling = ("attention", "unit") if network.has_attention else ("evidence", "positive")
    backbone = network.model.backbone
    values = upsample_maps(out[name], network.image_size, backbone.stride, backbone.offset)
    heat, rule = scale_map(values, scaling), network.box_rule
    boxes = detect_boxes(scale_map(values, rule.scaling) if rule.scaling else heat, rule)
    return heat, boxes[0] if len(boxes) else None


def _make_prediction(
    network: TrainedNetwork,
    item: InputImage,
    name: str,
    heat: np.ndarray,
    box: np.ndarray | None,
    score: float,
    found: list[str],
    ratio: str,
) -> Prediction:
    height, width = item.display.shape
    is_positive = score >= network.threshold
    verdict = f"score {score:.3f}: {CLASSES[int(is_positive)]}"
    verdict += f", threshold {network.threshold:.3f} ({network.threshold_origin})"
    verdict += f", cardiothoracic ratio {ratio}" if ratio else ""
    scaled = None if box is None else box * np.array([width, height, width, height]) / network.image_size
    return Prediction(name, item.display, heat, scaled, verdict, found, is_positive)


def _map_name(network: TrainedNetwork) -> str:
    return "attention W, 0-1" if network.has_attention else "class evidence / its maximum"


def _remark(network: TrainedNetwork) -> str:
    if network.is_phantom:
        return "The network was trained on drawings (chest phantoms), not on X-rays."
    views = describe_views(network.config.data.views)
    return f"The network was trained on {views}." if views else ""


def _summarize(
    network: TrainedNetwork, statistics: InputStatistics | None, counts: collections.Counter
) -> dict[str, Any]:
    return {
        "remark": f"{_remark(network)} {FOOTER}".strip(),
        "network": str(network.source),
        "config": flatten_config(network.config),
        "checkpoint_step": network.meta["progress"]["best_step"],
        "trained_on": network.meta["fingerprint"],
        "image_size": network.image_size,
        "normalization": network.normalization,
        "threshold": network.threshold,
        "threshold_origin": network.threshold_origin,
        "calibration": None if network.calibration is None else vars(network.calibration),
        "box": f"{_map_name(network)}: {describe_rule(network.box_rule)}; px of the file; for positive decisions only",
        "compared_with_training_images": 0 if statistics is None else statistics.num_images,
        "counts": dict(counts),
        "environment": describe_environment(),
    }
