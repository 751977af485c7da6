"""Figures of a report that show X-rays and maps: Figs. 7, 8, 9, the worst errors, and every box."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cxa_jax.figures import CLASSES, HEAT, SIGNED, superimpose
from cxa_jax.heat_maps import upsample_maps
from cxa_jax.localization_table import LocalizationTable
from cxa_jax.report_figures import Picture, create_figure
from cxa_jax.report_localization import RULE_NAMES, name_map
from cxa_jax.report_numbers import Group
from cxa_jax.results import Result
from cxa_jax.saved_maps import NUM_WORST, SavedMaps, draw_shared_rows

NUM_POSITIVES, NUM_NEGATIVES = 4, 2
NUM_PAIRS = 6
SHEET_COLUMNS, SHEET_IMAGES = 12, 120
SHEET_STYLES = {"attention": ("#E69F00", "-", "orange"), "evidence": ("#56B4E9", "--", "light blue, dashed")}


def shared_examples(results: Sequence[Result], num_positives: int, num_negatives: int) -> list[tuple[str, int]]:
    """Return (id, label) of images drawn by chance from the ids, which every run kept: positives, then negatives."""
    table = results[0].test

    def drawn(label: int) -> list[str]:
        ids = [str(image_id) for image_id in table.id[draw_shared_rows(table.id, table.label, label)]]
        return [image_id for image_id in ids if all(result.maps.find(image_id) is not None for result in results)]

    return [
        (image_id, label)
        for label, number in ((1, num_positives), (0, num_negatives))
        for image_id in drawn(label)[:number]
    ]


def draw_attention(groups: Sequence[Group], phantom: bool, intensity: float) -> list[Picture]:
    """Draw W beside X-rays (Fig. 7) and superimposed (Fig. 8), the same images for every model; W fixed on 0-1."""
    shown = [group for group in groups if group.has_attention and "attention" in group.results[0].maps.maps]
    if not shown:
        return []
    examples = shared_examples([group.results[0] for group in shown], NUM_POSITIVES, NUM_NEGATIVES)
    if not examples:
        return []
    pictures = []
    for number, title in ((7, "attention W"), (8, f"attention superimposed at {intensity:g}")):
        figure = create_figure(2.1 * len(examples) + 0.9, 2.4 * len(shown) + 2.6, phantom)
        panels = figure.subplots(len(shown) + 1, len(examples), squeeze=False)
        for column, (image_id, label) in zip(panels.T, examples, strict=True):
            _show_xray(column[0], shown[0].results[0].maps, image_id, f"{image_id}\n{CLASSES[label]}")
            for axes, group in zip(column[1:], shown, strict=True):
                image, heat = _image_and_map(group.results[0].maps, image_id, "attention")
                mappable = axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1)
                if number == 8:
                    axes.imshow(superimpose(image, heat, intensity))
                _finish_map(axes, group, image_id)
        figure.colorbar(mappable, ax=panels[1:], fraction=0.025, shrink=0.8, label="W, fixed scale")
        caption = (
            "Images drawn by chance from the ids, not picked; first run of each model. True box in white. W stands on "
            "a fixed scale from 0 to 1 in every panel."
        )
        pictures.append(Picture(f"fig{number}_attention", f"Fig. {number}: {title}", caption, figure))
    return pictures


def draw_pairs(groups: Sequence[Group], phantom: bool) -> Picture | None:
    """Draw class evidence of models with attention against those without, on the same positives (Fig. 9)."""
    pair = [next((g for g in groups if g.results[0].maps and g.has_attention == kind), None) for kind in (True, False)]
    if None in pair:
        return None
    results = [group.results[0] for group in pair]
    ids = [image_id for image_id, _ in shared_examples(results, NUM_PAIRS, 0)]
    if not ids:
        return None
    figure = create_figure(2.1 * len(ids) + 0.9, 7.4, phantom)
    panels = figure.subplots(3, len(ids), squeeze=False)
    limits = [np.abs(result.maps.maps["evidence"]).max() for result in results]
    for column, image_id in zip(panels.T, ids, strict=True):
        _show_xray(column[0], results[0].maps, image_id, image_id)
        for axes, group, limit in zip(column[1:], pair, limits, strict=True):
            _, heat = _image_and_map(group.results[0].maps, image_id, "evidence")
            mappable = axes.imshow(heat / limit, cmap=SIGNED, vmin=-1, vmax=1)
            _finish_map(axes, group, image_id, "black")
    figure.colorbar(mappable, ax=panels[1:], fraction=0.025, shrink=0.8, label="class evidence / the model's largest")
    caption = (
        "Positives drawn by chance from the ids. Class evidence: each cell's part of the logit (for a linear head on "
        "an average it is the class-activation map); orange speaks for cardiomegaly. One scale for each model."
    )
    return Picture("fig9_evidence", "Fig. 9: attention against average pooling, same positives", caption, figure)


def draw_worst(group: Group, phantom: bool) -> Picture | None:
    """Draw the lowest-scored positives and highest-scored negatives of a model's first run."""
    result = group.results[0]
    if result.maps is None:
        return None
    table = result.test
    order = np.argsort(table.score, kind="stable")
    misses = [row for row in order if table.label[row] == 1][: NUM_WORST // 2]
    alarms = [row for row in order[::-1] if table.label[row] == 0][: NUM_WORST // 2]
    rows = [row for row in (*misses, *alarms) if result.maps.find(table.id[row]) is not None]
    if not rows:
        return None
    columns = NUM_WORST // 2
    figure = create_figure(2.05 * columns, 2.6 * math.ceil(len(rows) / columns) + 0.3, phantom)
    panels = figure.subplots(math.ceil(len(rows) / columns), columns, squeeze=False).ravel()
    for axes, row in zip(panels, rows, strict=False):
        image_id, about = table.id[row], [column[row] for column in table.attributes.values()]
        findings = str(about.pop()) if "findings" in table.attributes else ""
        title = f"{image_id}\n{CLASSES[table.label[row]]}, {100 * table.score[row]:.1f} %\n{' '.join(map(str, about))}"
        _show_xray(axes, result.maps, image_id, f"{title}\n{findings[:28]}")
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    caption = (
        "First run: the positives with the lowest scores, then the negatives with the highest; true boxes in white."
    )
    return Picture(f"worst_{_slug(group.name)}", f"What went wrong: {group.name}", caption, figure)


def draw_contact_sheets(group: Group, phantom: bool) -> list[Picture]:
    """Draw every boxed positive with its true box and the boxes found in the model's maps, a page's worth a sheet."""
    result = group.results[0]
    if result.maps is None or result.boxes is None:
        return []
    ids = [image_id for image_id in result.boxes.ids if result.maps.find(image_id) is not None]
    sheets = [ids[start : start + SHEET_IMAGES] for start in range(0, len(ids), SHEET_IMAGES)]
    rule = result.boxes.answering_rule or "half_max"  # without a map there is nothing to draw
    chosen = [name for name in SHEET_STYLES if (name, rule) in result.boxes.scores]
    legend = "; ".join(f"{name_map(name)}: {SHEET_STYLES[name][2]}" for name in chosen)
    pictures = []
    for number, sheet in enumerate(sheets, 1):
        part = f" ({number} of {len(sheets)})" if len(sheets) > 1 else ""
        end = f"_{number}" if len(sheets) > 1 else ""
        caption = f"{len(ids)} of {len(result.boxes.ids)} boxed positives{part}; first run. True box: white; found by "
        caption += f"{RULE_NAMES[rule]}: {legend}."
        figure = _draw_sheet(result, sheet, chosen, rule, phantom)
        pictures.append(Picture(f"boxes_{_slug(group.name)}{end}", f"Every box: {group.name}{part}", caption, figure))
    return pictures


def _draw_sheet(result: Result, ids: Sequence[str], chosen: Sequence[str], rule: str, phantom: bool) -> Figure:
    rows = math.ceil(len(ids) / SHEET_COLUMNS)
    figure = create_figure(SHEET_COLUMNS * 1.05, 1.2 * rows + 0.3, phantom)
    panels = figure.subplots(rows, SHEET_COLUMNS, squeeze=False).ravel()
    for axes, image_id in zip(panels, ids, strict=False):
        _show_xray(axes, result.maps, image_id, str(image_id).removesuffix(".png"), size=5)
        for name in chosen:
            colour, line, _ = SHEET_STYLES[name]
            _draw_box(axes, _detected_box(result.maps, result.boxes, (name, rule), image_id), colour, line)
    for axes in panels[len(ids) :]:
        axes.set_axis_off()
    return figure


def _image_and_map(maps: SavedMaps, image_id: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the X-ray [s, s] in [0, 1] and the map upsampled to its frame."""
    row = maps.find(image_id)
    image = maps.images[row] / 255
    scale = image.shape[0] / maps.image_size
    # A pixel of the reduced picture covers 1 / scale px, from whose middle the map is read.
    offset = (maps.offset + 0.5) * scale - 0.5
    return image, upsample_maps(maps.maps[name][row], image.shape, maps.stride * scale, offset)


def _scaled_box(maps: SavedMaps, image_id: str) -> np.ndarray:
    row = maps.find(image_id)
    return maps.boxes[row] * (maps.images.shape[1] / maps.image_size)


def _detected_box(maps: SavedMaps, table: LocalizationTable, key: tuple[str, str], image_id: str) -> np.ndarray:
    row = int(np.flatnonzero(table.ids == image_id)[0])
    return table.scores[key].predicted[row] * (maps.images.shape[1] / maps.image_size)


def _finish_map(axes: Axes, group: Group, image_id: str, colour: str = "white") -> None:
    result = group.results[0]
    score = float(result.test.score[result.test.id == image_id][0])
    _draw_box(axes, _scaled_box(result.maps, image_id), colour)
    axes.set_title(f"{group.name}\n{100 * score:.1f} % cardiomegaly", fontsize=8)
    axes.set_axis_off()


def _show_xray(axes: Axes, maps: SavedMaps, image_id: str, title: str, size: int = 7) -> None:
    axes.imshow(maps.images[maps.find(image_id)], cmap="gray", vmin=0, vmax=255)
    _draw_box(axes, _scaled_box(maps, image_id), "white")
    axes.set_title(title, fontsize=size)
    axes.set_axis_off()


def _draw_box(axes: Axes, box: np.ndarray, colour: str, line: str = "-") -> None:
    if np.isfinite(box).all():
        x, y, w, h = box
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colour, linestyle=line, linewidth=1))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
