"""Pictures of a run: augmented images (Fig. 3), training curves, test X-rays with their attention (Figs. 7, 8)."""

import pathlib
import textwrap
from functools import partial
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.evaluate import Predictions
from cxa_jax.heat_maps import Rule, describe_rule, detect_boxes, make_rule, scale_map, upsample_maps
from cxa_jax.localization_table import find_leading_map
from cxa_jax.model_names import name_backbone
from cxa_jax.run import Run
from cxa_jax.scored_maps import MAP_KINDS
from cxa_jax.steps import augment_batch
from cxa_jax.workdir import flatten_config

LINE = 110  # characters that a sheet is wide
NUM_EACH = 2  # test images of each kind on a sheet
PHANTOM_MARK = "chest phantom (drawings, not X-rays of patients)"
CLASSES = ("no finding", "cardiomegaly")
# Perceptually even and readable by the colour-blind; 0 of HEAT is black, so that it leaves an X-ray as it is.
HEAT, SIGNED = "magma", "PuOr_r"
FONT_FILE = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Latin, Greek, Cyrillic


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Write a PNG or PDF, as the name says, all or nothing."""
    with replace_when_written(path) as neighbour:
        figure.savefig(neighbour, format=path.suffix[1:], dpi=110)


def superimpose(image: np.ndarray, heat: np.ndarray, intensity: float) -> np.ndarray:
    """Lay a colour map over an X-ray: clip(image + intensity x colour) (Figs. 1, 8; A22).

    Args:
      image: [H, W] in [0, 1].
      heat: [H, W] in [0, 1], on a fixed scale: stretching each map would fake contrast.
      intensity: 0.2 in the paper.

    Returns:
      [H, W, 3] in [0, 1].
    """
    colour = matplotlib.colormaps[HEAT](heat)[..., :3]
    return np.clip(image[..., None] + intensity * colour, 0, 1)


def save_augmentation_grid(run: Run, path: pathlib.Path) -> None:
    """Draw the first training batch as the network sees it, labels as titles (Fig. 3); as PNG and as PDF."""
    config = run.config
    size = max(16, config.train.batch_size)
    batch = next(make_train_iterator(run.dataset.splits["train"], config.data, batch_size=size, seed=config.seed))
    # min-max whatever the network's own normalisation, which may leave [0, 1]
    augmented = jax.jit(partial(augment_batch, normalization="min_max", config=config.augment))
    images = np.asarray(augmented(run.root_key, 0, {"image": batch["image"]}))[:16]
    figure = Figure(figsize=(9, 9.9), layout="constrained")
    figure.suptitle(_title(run, "augmented training images, 1 = cardiomegaly"))
    for axes, image, label in zip(figure.subplots(4, 4).flat, images, batch["label"], strict=False):
        axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(str(label))
        axes.set_axis_off()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".pdf"))


def save_curves(run: Run, history: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw losses, dev AUROC and learning rate against epochs; the kept epoch is marked."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    figure.suptitle(_title(run, "training"))
    losses, auroc, rate = figure.subplots(1, 3)
    for name in ("train_loss", "dev_loss", "dev_loss_weighted"):
        losses.plot(epochs, [row[name] for row in history], marker=".", label=name.replace("_", " "))
    losses.set(xlabel="epoch", ylabel="binary cross-entropy")
    losses.legend()
    auroc.plot(epochs, [row["dev_auroc"] for row in history], marker=".", color="tab:blue")
    auroc.set(xlabel="epoch", ylabel="dev AUROC")
    rate.step(epochs, [row["learning_rate"] for row in history], where="mid", color="tab:gray")
    rate.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    monitored = run.config.train.select_by
    values = np.array([row[monitored] for row in history], float)
    if np.isfinite(values).any():
        best = np.nanargmax(values) if monitored == "dev_auroc" else np.nanargmin(values)
        for axes in (losses, auroc, rate):
            axes.axvline(epochs[best], color="black", linestyle=":", linewidth=1)
    save_figure(figure, path)


def choose_examples(predictions: Predictions, threshold: float, seed: int, num_each: int = NUM_EACH) -> np.ndarray:
    """Draw rows by chance, the same number of true and false positives and negatives where there are that many."""
    rng = np.random.default_rng(seed)
    called = predictions.score >= threshold
    rows = []
    for label, positive in ((1, True), (1, False), (0, True), (0, False)):
        candidates = np.flatnonzero((predictions.label == label) & (called == positive))
        rows.append(rng.permutation(candidates)[:num_each])
    return np.concatenate(rows)


def save_attention_sheet(
    run: Run,
    predictions: Predictions,
    threshold: float,
    path: pathlib.Path,
    rule: Rule | None = None,
) -> None:
    """Draw test X-rays beside attention, superimposed attention and class evidence.

    W stands on a fixed scale from 0 to 1 in every picture; evidence on one symmetric scale for the sheet. Images are
    drawn by chance from true and false positives and negatives, not picked. On the X-rays lie the true box and the one
    found in the map that answers for the model.

    Args:
      run: whose data and network.
      predictions: of the split that is drawn.
      threshold: of a predicted positive.
      path: PNG.
      rule: of the found boxes; by default half the maximum.
    """
    name, rule = find_leading_map(predictions.maps), rule or make_rule("half_max")
    rows = choose_examples(predictions, threshold, run.config.seed)
    split = run.dataset.splits[predictions.split]
    limit = float(np.abs(predictions.evidence[rows]).max()) or 1.0
    figure = Figure(figsize=(11, 2.75 * len(rows) + 0.5), layout="constrained")
    boxes = "true boxes green"
    if name:
        boxes += f"; found ones orange, dashed: {MAP_KINDS[name].title}, {describe_rule(rule)}"
    said = f"{predictions.split} images, threshold {threshold:.3g}\n{textwrap.fill(boxes, LINE)}"
    figure.suptitle(_title(run, said), fontsize=11)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        record = split.source[int(row)]
        image = _min_max(record["image"][..., 0])
        heat, evidence = (
            upsample_maps(maps[row], image.shape, run.model.backbone.stride, run.model.backbone.offset)
            for maps in (predictions.attention, predictions.evidence)
        )
        line[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        for box in record["boxes"]:
            _draw_box(line[0], box, edgecolor="lime")
        if name:
            cells = upsample_maps(
                predictions.maps[name][row], image.shape, run.model.backbone.stride, run.model.backbone.offset
            )
            for box in detect_boxes(scale_map(cells, rule.scaling or MAP_KINDS[name].scaling), rule):
                _draw_box(line[0], box, edgecolor="orange", linestyle="--")
        line[0].set_title(f"{predictions.index['id'][row]}: {CLASSES[predictions.label[row]]}", fontsize=9)
        shown = line[1].imshow(heat, cmap=HEAT, vmin=0, vmax=1)
        line[1].set_title("attention W", fontsize=9)
        figure.colorbar(shown, ax=line[1], fraction=0.046)
        line[2].imshow(superimpose(image, heat, run.config.eval.overlay_intensity))
        line[2].set_title(f"predicted {100 * predictions.score[row]:.1f} % cardiomegaly", fontsize=9)
        shown = line[3].imshow(evidence, cmap=SIGNED, vmin=-limit, vmax=limit)
        line[3].set_title("class evidence (logit a cell)", fontsize=9)
        figure.colorbar(shown, ax=line[3], fraction=0.046)
        for panel in line:
            panel.set_axis_off()
    save_figure(figure, path)


def _draw_box(axes: Axes, box: np.ndarray, **style: str) -> None:
    x, y, w, h = box  # edges of pixels; imshow has pixel 0 from -.5 to .5
    axes.add_patch(matplotlib.patches.Rectangle((x - 0.5, y - 0.5), w, h, fill=False, **style))


def _min_max(image: np.ndarray) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    return (image.astype(np.float64) - low) / (high - low) if high > low else np.zeros(image.shape)


def _title(run: Run, text: str) -> str:
    return f"{name_backbone(flatten_config(run.config))} + {run.config.model.pooling}: {text}\n{run.dataset.title}"
