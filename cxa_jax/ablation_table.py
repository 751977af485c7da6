"""From the scores of an ablation's runs to its table: means over seeds, paired differences, controls, step times."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cxa_jax.model_names import name_backbone
from cxa_jax.seed_comparison import SeedSamples, combine, compare, sample_auroc, sample_means

METRICS = ("auroc", "pointing", "energy_ratio", "mean_iou")
BOUNDS = dict.fromkeys(METRICS, (0.0, 1.0)) | {"energy_ratio": (0.0, np.inf)}
KINDS = {"auroc": "area", "pointing": "share", "mean_iou": "share"}
REFERENCES = ("amm", "gap")
CONTROLS = ("random_map", "image_centre", "median_box")
POOLED = {  # by config.model.attended: what AMM and GAP average, besides the weights
    "normalized": "AMM pools BN(F), GAP F",
    "raw": "both pool F",
    "all_normalized": "both pool BN(F)",
}
TITLES = {"auroc": "AUROC", "pointing": "pointing", "energy_ratio": "energy ratio", "mean_iou": "mean IoU"}

Scores = Mapping[tuple[str, int], tuple[dict[str, np.ndarray], dict[str, Any]]]


def compute_table(
    scores: Scores, step_times: dict[str, Any] | None, num_resamples: int, seed: int = 0
) -> dict[str, Any]:
    """Compute every number of an ablation.

    Args:
      scores: (pooling, seed) -> (columns, facts) of a run, as `ablation_member.load_scores` returns them.
      step_times: what `ablation_member.measure_step_times` wrote, or None.
      num_resamples: of patients, the same ones for every run.
      seed: of the resamples.

    Returns:
      `poolings`: for each its seeds, head, metrics (value of each seed, mean, interval) and step time; `differences`:
      to AMM and to GAP, runs paired by seed, images by patient; `controls`: what looks at no image; `data`: the test
      set.
    """
    names = list(dict.fromkeys(pooling for pooling, _ in scores))
    seeds = {name: [seed for pooling, seed in scores if pooling == name] for name in names}
    options = {"num_resamples": num_resamples, "seed": seed}

    def sample(name: str, metric: str, chosen: list[int], prefix: str = "weights") -> SeedSamples | None:
        columns = [scores[name, one][0] for one in chosen]
        first = columns[0]
        if metric == "auroc":
            return sample_auroc(first["label"], np.stack([c["logit"] for c in columns]), first["patient"], **options)
        if not len(first["boxed_patient"]):
            return None
        values = np.stack([c[f"{prefix}/{metric}"] for c in columns])
        return sample_means(values, first["boxed_patient"], **options)

    def difference(a: str, b: str, metric: str) -> dict[str, Any] | None:
        common = [one for one in seeds[a] if one in seeds[b]]
        samples = [sample(name, metric, common) for name in (a, b)] if common else [None]
        low, high = BOUNDS[metric]
        return None if None in samples else dataclasses.asdict(compare(*samples, bounds=(low - high, high - low)))

    columns, facts = next(iter(scores.values()))
    controls = {
        control: {
            metric: _describe(sample(names[0], metric, seeds[names[0]], control), metric) for metric in METRICS[1:]
        }
        for control in CONTROLS
    }
    return {
        "data": _describe_data(columns, facts),
        "poolings": {
            name: {
                "head": scores[name, seeds[name][0]][1]["config"]["model.head"],
                "attended": scores[name, seeds[name][0]][1]["config"]["model.attended"],
                "seeds": seeds[name],
                "best_epochs": [scores[name, one][1]["best_epoch"] for one in seeds[name]],
                "wall_s": [scores[name, one][1]["wall_s"] for one in seeds[name]],
                "metrics": {metric: _describe(sample(name, metric, seeds[name]), metric) for metric in METRICS},
                "step_time": describe_step(name, step_times),
            }
            for name in names
        },
        "differences": {
            reference: {
                name: {metric: difference(name, reference, metric) for metric in METRICS}
                for name in names
                if name != reference
            }
            for reference in REFERENCES
            if reference in names
        },
        "controls": controls,
        "commits": sorted({facts["environment"]["commit"] for _, facts in scores.values()}),
        "environment": facts["environment"],
        "config": facts["config"],
    }


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
    interval = combine(samples, bounds=BOUNDS[metric], kind=KINDS.get(metric, ""))
    return {"per_seed": samples.estimates.tolist()} | dataclasses.asdict(interval)


def describe_step(name: str, step_times: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the median step, and the median over rounds of its ratio to the reference's same round, with 95 %."""
    if step_times is None or name not in step_times["seconds"]:
        return None
    seconds = step_times["seconds"]
    reference = next((name for name in ("gap", "amm") if name in seconds), name)
    ratios = np.divide(seconds[name], seconds[reference])
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))  # of rounds
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    ratio = {"to": reference, "estimate": float(np.median(ratios)), "low": float(low), "high": float(high)}
    return {"p50_s": float(np.median(seconds[name])), "ratio": ratio}


def table_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one flat row for each pooling and control, for a CSV file."""
    rows = []
    for name, pooling in report["poolings"].items():
        row = {"name": name, "kind": "pooling", "head": pooling["head"], "num_seeds": len(pooling["seeds"])}
        row |= _flat(pooling["metrics"])
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
    """Return the report as Markdown: AMM against GAP first, then all poolings, the controls, and the differences."""
    data, poolings = report["data"], report["poolings"]
    lines = [f"# Ablation of the pooling, {name_backbone(report['config'])}, {data['image_size']} px", ""]
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
    if "gap" in report["differences"] and "amm" in poolings:
        same = poolings["amm"]["head"] == poolings["gap"]["head"]
        pooled = POOLED[poolings["gap"]["attended"]]
        lines += [f"AMM minus GAP ({'the same ' if same else 'another '}{poolings['gap']['head']} head; {pooled}):", ""]
        lines += _format_rows({"amm - gap": report["differences"]["gap"]["amm"]}) + [""]
    titles = title_rows(poolings)
    values = {titles[name]: pooling["metrics"] for name, pooling in poolings.items()}
    steps = {titles[name]: _format_step(pooling["step_time"]) for name, pooling in poolings.items()}
    controls = {f"control: {name.replace('_', ' ')}": metrics for name, metrics in report["controls"].items()}
    lines += _format_rows(values | controls, steps) + [""]
    for reference, differences in report["differences"].items():
        lines += [f"Difference to {reference}:", ""]
        lines += _format_rows({f"{titles[name]} - {reference}": row for name, row in differences.items()}) + [""]
    return "\n".join(lines)


def title_rows(poolings: dict[str, Any]) -> dict[str, str]:
    """Return each pooling's name with what sets it apart besides the pooling."""
    some_normed = any(own["attended"] == "all_normalized" for own in poolings.values())
    titles = {}
    for name, own in poolings.items():
        apart = [] if own["head"] == "mlp" else [f"{own['head']} head"]
        apart += ["reads F"] if some_normed and own["attended"] != "all_normalized" else []
        titles[name] = f"{name} ({', '.join(apart)})" if apart else name
    return titles


def _format_rows(rows: dict[str, dict[str, Any]], steps: dict[str, str] | None = None) -> list[str]:
    titles = ["", *TITLES.values(), *(["step"] if steps else [])]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, metrics in rows.items():
        cells = [name, *(_format(metrics.get(metric)) for metric in TITLES)]
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
