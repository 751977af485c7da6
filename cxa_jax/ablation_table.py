"""From the scores of an ablation's runs to its table: means over seeds, paired differences, controls, step times."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cxa_jax.ablation_arms import Arm, find_references, find_step_reference, title_metrics
from cxa_jax.model_names import name_backbone
from cxa_jax.seed_comparison import SeedSamples, combine, compare, sample_auroc, sample_means

BOUNDS = {"energy_ratio": (0.0, np.inf)}  # all others lie in [0, 1]
KINDS = {"auroc": "area", "energy_ratio": ""}  # all others are shares
GRID_CONTROL, CONTROLS = "random_map", ("image_centre", "median_box")
POOLED = {  # by config.model.attended: what AMM and GAP average, besides the weights
    "normalized": "AMM pools BN(F), GAP F",
    "raw": "both pool F",
    "all_normalized": "both pool BN(F)",
}

Scores = Mapping[tuple[Arm, int], tuple[dict[str, np.ndarray], dict[str, Any]]]


def compute_table(
    scores: Scores, step_times: dict[str, Any] | None, rules: Sequence[str], num_resamples: int, seed: int = 0
) -> dict[str, Any]:
    """Compute every number of an ablation.

    Args:
      scores: (arm, seed) -> (columns, facts) of a run, as `ablation_member.load_scores` returns them.
      step_times: what `ablation_member.measure_step_times` wrote, or None.
      rules: threshold rules, a mean IoU each.
      num_resamples: of patients, the same ones for every run.
      seed: of the resamples.

    Returns:
      `metrics`: their names and titles; `poolings`: for each arm, by its name, pooling, stride (None: not compared),
      seeds, head, metrics (value of each seed, mean, interval) and step time; `differences`: to the arms of
      `find_references`, runs paired by seed, images by patient; `controls`: what looks at no image; `data`: the test
      set.
    """
    arms = list(dict.fromkeys(arm for arm, _ in scores))
    seeds = {arm: [seed for other, seed in scores if other == arm] for arm in arms}
    titles = title_metrics(rules)
    options = {"num_resamples": num_resamples, "seed": seed}

    def sample(arm: Arm, metric: str, chosen: list[int], prefix: str = "weights") -> SeedSamples | None:
        columns = [scores[arm, one][0] for one in chosen]
        first = columns[0]
        if metric == "auroc":
            return sample_auroc(first["label"], np.stack([c["logit"] for c in columns]), first["patient"], **options)
        if not len(first["boxed_patient"]):
            return None
        values = np.stack([c[f"{prefix}/{metric}"] for c in columns])
        return sample_means(values, first["boxed_patient"], **options)

    def difference(a: Arm, b: Arm, metric: str) -> dict[str, Any] | None:
        common = [one for one in seeds[a] if one in seeds[b]]
        samples = [sample(arm, metric, common) for arm in (a, b)] if common else [None]
        low, high = find_bounds(metric)
        return None if None in samples else dataclasses.asdict(compare(*samples, bounds=(low - high, high - low)))

    def describe(arm: Arm) -> dict[str, Any]:
        facts = [scores[arm, one][1] for one in seeds[arm]]
        return {
            "pooling": arm.pooling,
            "stride": arm.stride,
            "title": arm.title,
            "head": facts[0]["config"]["model.head"],
            "attended": facts[0]["config"]["model.attended"],
            "seeds": seeds[arm],
            "best_epochs": [own["best_epoch"] for own in facts],
            "wall_s": [own["wall_s"] for own in facts],
            "metrics": {metric: _describe(sample(arm, metric, seeds[arm]), metric) for metric in titles},
            "step_time": describe_step(arm, arms, step_times),
        }

    columns, facts = next(iter(scores.values()))
    # The map's grid is the stride's, so a random map is too; the others are the same for all.
    control_arms = {Arm(GRID_CONTROL, arm.stride): arm for arm in reversed(arms)}
    control_arms = dict(reversed(control_arms.items())) | {Arm(control): arms[0] for control in CONTROLS}
    controls = {
        control.name: {
            metric: _describe(sample(arm, metric, seeds[arm], control.pooling), metric)
            for metric in titles
            if metric != "auroc"
        }
        for control, arm in control_arms.items()
    }
    return {
        "data": _describe_data(columns, facts),
        "metrics": titles,
        "poolings": {arm.name: describe(arm) for arm in arms},
        "differences": {
            reference.name: {
                arm.name: {metric: difference(arm, reference, metric) for metric in titles} for arm in compared
            }
            for reference, compared in find_references(arms).items()
        },
        "controls": controls,
        "commits": sorted({facts["environment"]["commit"] for _, facts in scores.values()}),
        "environment": facts["environment"],
        "config": facts["config"],
    }


def find_bounds(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value of a metric."""
    return BOUNDS.get(metric, (0.0, 1.0))


def _describe_data(columns: dict[str, np.ndarray], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": facts["description"],
        "fingerprint": facts["fingerprint"],
        "image_size": facts["config"]["data.image_size"],
        "num_test_images": len(columns["label"]),
        "num_positives": int(columns["label"].sum()),
        "num_patients": len(np.unique(columns["patient"])),
        "num_boxed": len(columns["boxed_patient"]),
        "num_boxed_patients": len(np.unique(columns["boxed_patient"])),
    }


def _describe(samples: SeedSamples | None, metric: str) -> dict[str, Any] | None:
    if samples is None:
        return None
    interval = combine(samples, bounds=find_bounds(metric), kind=KINDS.get(metric, "share"))
    return {"per_seed": samples.estimates.tolist()} | dataclasses.asdict(interval)


def describe_step(arm: Arm, arms: Sequence[Arm], step_times: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the median step, and the median over rounds of its ratio to the reference's same round, with 95 %.

    Args:
      arm: whose step.
      arms: all that were run.
      step_times: `seconds`: those of each round by the arm's name; or None.
    """
    if step_times is None or arm.name not in step_times["seconds"]:
        return None
    seconds = step_times["seconds"]
    reference = find_step_reference([other for other in arms if other.name in seconds]) or arm
    ratios = np.divide(seconds[arm.name], seconds[reference.name])
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))  # of rounds
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    ratio = {"to": reference.name, "estimate": float(np.median(ratios)), "low": float(low), "high": float(high)}
    return {"p50_s": float(np.median(seconds[arm.name])), "ratio": ratio}


def table_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one flat row for each pooling and control, for a CSV file."""
    rows = []
    for name, pooling in report["poolings"].items():
        row = {"name": name, "kind": "pooling"} | {field: pooling[field] for field in ("pooling", "stride", "head")}
        row |= {"num_seeds": len(pooling["seeds"])} | _flat(pooling["metrics"])
        for reference, differences in report["differences"].items():
            row |= _flat(differences.get(name, {}), f"_minus_{reference}")
        step = pooling["step_time"]
        if step:
            row |= {"step_p50_s": step["p50_s"], f"step_ratio_to_{step['ratio']['to']}": step["ratio"]["estimate"]}
        rows.append(row)
    controls = report["controls"].items()
    return rows + [{"name": name, "kind": "control"} | _flat(metrics) for name, metrics in controls]


def _flat(metrics: dict[str, Any], suffix: str = "") -> dict[str, float]:
    row = {}
    for metric, value in metrics.items():
        if value is not None:
            row[metric + suffix] = value["estimate"]
            row |= {f"{metric}{suffix}_{end}": value[end] for end in ("low", "high")}
    return row


def format_table(report: dict[str, Any]) -> str:
    """Return the report as Markdown: AMM against GAP first, then all arms, the controls, and the differences."""
    data, poolings, differences = report["data"], report["poolings"], report["differences"]
    one_stride = len({own["stride"] for own in poolings.values()}) == 1
    compared = "the pooling" if one_stride else "pooling and stride"
    backbone = name_backbone(report["config"]) if one_stride else report["config"]["model.backbone"]
    lines = [f"# Ablation of {compared}, {backbone}, {data['image_size']} px", ""]
    lines += [
        f"{data['description'].split(' [')[0]}. Test: {data['num_test_images']:,} images, {data['num_positives']:,} "
        f"positive, {data['num_patients']:,} patients; {data['num_boxed']:,} boxed positives of "
        f"{data['num_boxed_patients']:,} patients. {report['config']['train.num_epochs']} epochs at most, the state of "
        f"the lowest {report['config']['train.select_by'].replace('_', ' ')}; seeds "
        f"{', '.join(str(seed) for seed in next(iter(poolings.values()))['seeds'])}.",
        "",
        "Means over seeds with 95 % intervals (patients resampled, plus the variance between seeds); differences are "
        "paired by seed and patient. Maps are each pooling's own weights p. The step time is the median, its ratio "
        "the median of that within each round. Intervals are not corrected for the number of comparisons.",
        "",
    ]
    titles, columns = title_rows(poolings), report["metrics"]
    for gap in (name for name, own in poolings.items() if own["pooling"] == "gap" and name in differences):
        for amm in (name for name in differences[gap] if poolings[name]["pooling"] == "amm"):
            same = "the same" if poolings[amm]["head"] == poolings[gap]["head"] else "another"
            pooled = POOLED[poolings[gap]["attended"]]
            lines += [f"AMM minus GAP ({same} {poolings[gap]['head']} head; {pooled}):", ""]
            row = {f"{poolings[amm]['title']} - {poolings[gap]['title']}": differences[gap][amm]}
            lines += _format_rows(columns, row) + [""]
    values = {titles[name]: pooling["metrics"] for name, pooling in poolings.items()}
    steps = {titles[name]: _format_step(pooling["step_time"]) for name, pooling in poolings.items()}
    controls = {f"control: {title_control(name)}": metrics for name, metrics in report["controls"].items()}
    lines += _format_rows(columns, values | controls, steps) + [""]
    for reference, rows in differences.items():
        title = poolings[reference]["title"]
        lines += [f"Difference to {title}:", ""]
        lines += _format_rows(columns, {f"{titles[name]} - {title}": row for name, row in rows.items()}) + [""]
    return "\n".join(lines)


def title_control(name: str) -> str:
    """Return the name of a control, for readers."""
    return name.replace("_", " ").replace("-stride", ", stride ")


def title_rows(poolings: dict[str, Any]) -> dict[str, str]:
    """Return each arm's title with what sets it apart besides pooling and stride."""
    some_normed = any(own["attended"] == "all_normalized" for own in poolings.values())
    titles = {}
    for name, own in poolings.items():
        apart = [] if own["head"] == "mlp" else [f"{own['head']} head"]
        apart += ["reads F"] if some_normed and own["attended"] != "all_normalized" else []
        titles[name] = f"{own['title']} ({', '.join(apart)})" if apart else own["title"]
    return titles


def _format_rows(
    columns: dict[str, str], rows: dict[str, dict[str, Any]], steps: dict[str, str] | None = None
) -> list[str]:
    titles = ["", *columns.values(), *(["step"] if steps else [])]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, metrics in rows.items():
        cells = [name, *(_format(metrics.get(metric)) for metric in columns)]
        lines.append("| " + " | ".join([*cells, *([steps.get(name, "-")] if steps else [])]) + " |")
    return lines


def _format(value: dict[str, Any] | None) -> str:
    if value is None or not np.isfinite(value["estimate"]):
        return "-"
    return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _format_step(step: dict[str, Any] | None) -> str:
    if step is None:
        return "-"
    ratio = step["ratio"]
    quartiles = f"{ratio['estimate']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return f"{1000 * step['p50_s']:.0f} ms, {quartiles} x {ratio['to']}"
