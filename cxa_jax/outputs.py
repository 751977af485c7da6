"""What a run leaves behind: predictions, metrics.json, pictures, the closing summary; of the lowest-dev-loss state."""

import logging
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cxa_jax import figures
from cxa_jax.array_types import PyTree
from cxa_jax.box_reader import BoxReader, save_readers
from cxa_jax.checkpointing import Checkpoints, read_first
from cxa_jax.classification import FIXED_THRESHOLD
from cxa_jax.data.input_statistics import compute_input_statistics, save_input_statistics
from cxa_jax.distributed import stop_if_agreed, stopping_together, writable
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions, evaluate_split
from cxa_jax.finding_metrics import write_findings
from cxa_jax.localization import BoxedImages
from cxa_jax.localization_table import find_leading_map, write_localization
from cxa_jax.map_controls import MapControls, draw_controls
from cxa_jax.map_evaluation import Localization, collect_maps, evaluate_maps, find_boxed_images
from cxa_jax.map_rules import MapRules, find_rules, tune_rules
from cxa_jax.metrics import compute_youden_threshold
from cxa_jax.moments import fit_moments
from cxa_jax.phantom_readers import READERS_FILE, describe_readers, find_readers, fit_phantom_readers
from cxa_jax.predictions import PredictionTable, read_predictions, write_predictions
from cxa_jax.ratio_metrics import save_ratio
from cxa_jax.results import DEV_FILE, name_other_dev
from cxa_jax.run import Run, create_run, log_run
from cxa_jax.run_metrics import compute_run_metrics
from cxa_jax.saved_maps import choose_rows, save_maps
from cxa_jax.short_cuts import measure_short_cuts
from cxa_jax.summary import format_summary
from cxa_jax.workdir import (
    add_younger_fields,
    check_same_run,
    describe_environment,
    flatten_config,
    log_to_file,
    open_workdir,
    to_json,
    write_atomically,
)

log = logging.getLogger(__name__)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluate the best state of a finished or stopped run, at config.eval.image_size if it is set.

    Returns:
      What was written to metrics.json (in `eval_SIZE/` for another size than the training's).

    Raises:
      UserError: the workdir holds no checkpoint, or another run's, or a training holds it.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    if not (folder / "checkpoints" / "best").is_dir():
        raise UserError(f"--workdir={folder} holds no checkpoint; train first: the same command with --mode=train")
    with open_workdir(folder), writable(folder) as output:
        log_to_file(output)
        return _evaluate(config, folder, output)


def _evaluate(config: ConfigDict, folder: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
    run = create_run(config)
    size = config.eval.image_size or config.data.image_size
    with Checkpoints(folder, "latest", read_only=True) as latest, Checkpoints(folder, "best", read_only=True) as best:
        # The run as it is now, by its latest state: the best one may be from before a permitted change.
        meta = read_first(Checkpoints.read_meta, latest, best)
    for change in check_same_run(meta, config, run.dataset.fingerprint, folder) if meta else []:
        log.warning("evaluated with a change: %s", change)
    if size == config.data.image_size:
        log_run(run)
        return write_outputs(run, folder, output)
    resized = config.copy_and_resolve_references()
    with resized.unlocked():
        resized.data.image_size = size
        # As many images for the moments, in batches that fit: eval.batch_size bounds the memory of a larger size.
        batch_size = min(config.train.batch_size, config.eval.batch_size)
        resized.train.recompute_moments *= -(-config.train.batch_size // batch_size)
        resized.train.batch_size, resized.train.accumulate_steps = batch_size, 1
        resized.optimizer.warmup_steps = 0  # no part of a test; of another size there may be few images, so few steps
    run = create_run(resized)
    log_run(run)
    output = output / f"eval_{size}"
    output.mkdir(exist_ok=True)
    return write_outputs(run, folder, output)


@stopping_together()
def write_outputs(run: Run, folder: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
    """Restore the best state of `folder`, predict dev and test, and write every number and picture to `output`."""
    stored, meta = restore_best(run, folder)
    variables = refit_moments(run, stored, meta)
    boxed = {name: find_boxed_images(run.dataset.splits[name]) for name in ("dev", "test")}
    controls = draw_controls(run, variables) if any(len(images.rows) for images in boxed.values()) else None
    trained_size = meta["config"]["data.image_size"]
    dev, dev_name, tuned, fitted = predict_dev(run, variables, folder, output, trained_size, boxed["dev"], controls)
    test = predict_split(run, variables, "test", output)
    rules, readers = find_rules(run, tuned), find_readers(run, test, fitted)
    boxes = save_localization(run, dev, test, output, boxed["test"], rules, controls, readers)
    save_readers(output / READERS_FILE, fitted)
    if test.finding_logits is not None:
        write_findings(test, run.config.eval.num_bootstrap, run.config.seed, output)
    if output == folder:  # at the training size: what foreign images are compared with
        statistics = compute_input_statistics(run.dataset.splits["train"], run.dataset.fingerprint)
        save_input_statistics(statistics, folder)
    report = {"checkpoint": _describe_checkpoint(meta)}
    ratio = save_ratio(run, dev, test.to_table(), output, boxed["test"], boxes and boxes.table)
    report |= compute_run_metrics(run, dev, test.to_table(), boxes, dev_name, ratio)
    report |= {"phantom_tuned_rules": tuned, "phantom_readers": describe_readers(readers)}
    now = {field: value for field, value in flatten_config(run.config).items() if field.startswith("eval.")}
    if variables is not stored:
        now["train.recompute_moments"] = run.config.train.recompute_moments
    report["short_cuts"] = measure_short_cuts(run, variables, test, boxed["test"], boxes and boxes.table)
    report |= {"config": meta["config"] | now, "environment": describe_environment()}
    write_atomically(output / "metrics.json", to_json(report))
    history = meta["progress"]["history"]
    figures.save_curves(run, history, output / "training_curves.png")
    chosen = report["test"]["at_dev_threshold"] or report["test"]["at_0.5"]
    rule = rules and rules.rules.get(find_leading_map(test.maps) or "")
    figures.save_attention_sheet(run, test, chosen["threshold"], output / "test_attention.png", rule)
    log.info("%s", format_summary(report))
    log.info("everything is in %s; a report of it: python launch.py --mode=report --workdirs=%s", output, output)
    return report


def refit_moments(run: Run, variables: dict[str, PyTree], meta: dict[str, Any]) -> dict[str, PyTree]:
    """Return the variables with moments of training images as the config asks for, where the stored ones are others.

    They are where the test size is another than the training's (arXiv 1906.06423), or config.train.recompute_moments
    another than the stored state's.

    Args:
      run: at the test size.
      variables: of the state to evaluate.
      meta: what was saved with them.
    """
    num_batches, size = run.config.train.recompute_moments, run.dataset.image_size
    stored, trained_size = add_younger_fields(meta["config"], run.config), meta["config"]["data.image_size"]
    if size == trained_size and num_batches in (0, stored["train.recompute_moments"]):
        return variables
    if not num_batches:
        log.warning(
            "batch norm's moments are those of the training's %d px, and images of %d px have others: the same command "
            "with --config.train.recompute_moments=24 --config.train.resume_changed=True recomputes them",
            trained_size, size,
        )  # fmt: skip
        return variables
    if not len(run.dataset.splits["train"].source):
        log.warning(
            "the data at %d px have no training images to recompute batch norm's moments on: they stay as they are "
            "stored, of the training size",
            size,
        )
        return variables
    log.info("recomputing batch norm's moments on training images of %d px", size)
    if size == trained_size:
        log.warning(
            "these moments are this test's alone: the checkpoint, --mode=predict and --mode=export keep the stored ones"
        )
    return fit_moments(run, variables, meta["progress"]["epoch"] - 1, num_batches)


def predict_dev(
    run: Run,
    variables: dict[str, PyTree],
    folder: pathlib.Path,
    output: pathlib.Path,
    image_size: int,
    boxed: BoxedImages,
    controls: MapControls | None,
) -> tuple[PredictionTable, str, dict[str, Any] | None, dict[str, BoxReader] | None]:
    """Predict dev; return its table, what it is in words, and the maps' rules and readers fitted on it.

    Where the data of another test size have other dev images than the run had, as a few originals have, the run's own
    predictions at its training size stand in: a threshold wants the dev images that there are.
    """
    own, split = folder / DEV_FILE, run.dataset.splits["dev"]
    if run.dataset.image_size != image_size and own.is_file():
        table = read_predictions(own)
        if set(table.id) != set(split.index["id"]):
            log.warning(
                "the data at %d px have other dev images than the run (%d, not %d): threshold and calibration are "
                "from dev at %d px",
                run.dataset.image_size, len(split.index["id"]), len(table), image_size,
            )  # fmt: skip
            (output / DEV_FILE).unlink(missing_ok=True)
            return table, name_other_dev(image_size), None, None
    predictions = predict_split(run, variables, "dev", output)
    if not run.dataset.is_phantom or not len(boxed.rows):
        return predictions.to_table(), "dev", None, None
    maps = collect_maps(run, predictions, boxed, controls)
    fitted = tune_rules(run, maps, boxed), fit_phantom_readers(run, predictions, boxed, maps)
    return predictions.to_table(), "dev", *fitted


def save_localization(
    run: Run,
    dev: PredictionTable,
    test: Predictions,
    output: pathlib.Path,
    boxed: BoxedImages,
    rules: MapRules | None = None,
    controls: MapControls | None = None,
    readers: dict[str, BoxReader] | None = None,
) -> Localization | None:
    """Score the maps against the boxes, and write localization_test.csv and maps_test.npz."""
    split, backbone = run.dataset.splits[test.split], run.model.backbone
    threshold = compute_youden_threshold(dev.label, dev.score)
    if not np.isfinite(threshold):  # dev has one class
        threshold = FIXED_THRESHOLD
    found = evaluate_maps(run, test, boxed, threshold, rules, controls, readers)
    if found is not None:
        write_localization(output / "localization_test.csv", found.table)
    rows = choose_rows(test, boxed.rows)
    save_maps(output / "maps_test.npz", test, split, rows, backbone.stride, backbone.offset)
    return found


def restore_best(run: Run, folder: pathlib.Path) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Return the variables of the lowest dev loss and what was saved with them.

    Raises:
      UserError: there is none, which after training means that no dev loss was a number.
    """
    abstract = run.abstract_state
    with Checkpoints(folder, "latest", read_only=True) as latest, Checkpoints(folder, "best", read_only=True) as best:
        restored = best.restore_variables({"params": abstract.params, "batch_stats": abstract.batch_stats})
        newest = read_first(Checkpoints.read_meta, latest, best)
    if restored is None:
        raise UserError(f"{folder} has no best checkpoint: no epoch ended with a finite dev loss; see metrics.csv")
    step, lowest = (meta["progress"]["best_step"] for meta in (restored[1], newest))
    if step < lowest:  # else the same, or the run was cut between writing the best and the latest
        log.warning(
            "the state of the lowest dev loss, of step %d, is lost; this is the one before it, of %d", lowest, step
        )
    return restored


def predict_split(run: Run, variables: dict[str, PyTree], name: str, output: pathlib.Path) -> Predictions:
    """Predict a split and write predictions_NAME.csv: one row for each image."""
    stop_if_agreed()
    split = run.dataset.splits[name]
    predictions = evaluate_split(
        run.test_step,
        variables,
        split,
        run.mesh,
        batch_size=run.config.eval.batch_size,
        num_threads=run.config.data.num_threads,
    )
    write_predictions(
        output / f"predictions_{name}.csv",
        ids=split.index["id"],
        patients=split.index["patient"],
        labels=predictions.label,
        logits=predictions.logit,
        scores=predictions.score,
        attributes=predictions.to_table().attributes,
    )
    return predictions


def _describe_checkpoint(meta: dict[str, Any]) -> dict[str, Any]:
    progress = meta["progress"]
    return {"step": progress["best_step"], "epoch": progress["epoch"], "monitored": progress["best_loss"]}
