"""From finished runs to the numbers of a report: runs grouped by model, seeds combined, groups compared."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cxa_jax.classification import (
    FIXED_THRESHOLD,
    PREVALENCES,
    STRATUM_METRICS,
    THRESHOLD_FREE,
    describe_predictions,
    describe_strata,
    short_interval,
)
from cxa_jax.comparison import PairedTest
from cxa_jax.errors import UserError
from cxa_jax.group_statistics import GroupStatistic, bootstrap_group, compare_groups, compute_group_delong
from cxa_jax.localization_table import summarize_tables
from cxa_jax.model_names import name_run
from cxa_jax.results import Result
from cxa_jax.statistics import NUM_RESAMPLES
from cxa_jax.strata import find_strata
from cxa_jax.workdir import describe_changes

THRESHOLD_STATISTICS = (
    "accuracy", "precision", "recall", "f1", "specificity", "npv", "precision_negative", "recall_negative",
    "f1_negative", "precision_weighted", "recall_weighted", "f1_weighted",
)  # fmt: skip

NAMED_FIELDS = tuple(f"model.{field}" for field in ("backbone", "pooling", "head", "stride", "stride_by"))  # in names
# How a run was tested, where it shapes its numbers, with what runs older than the field had.
TEST_FIELDS = {"eval.num_copies": 1, "eval.levels_run": ""}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one model that differ in the seed alone, or one predictions file.

    Attributes:
        name: the paper's name where there is one; what differs is added where two groups would share it.
        results: the runs.
        numbers: of each run, `classification.describe_predictions`.
        statistics: 'free' -> metric -> GroupStatistic, and the same under 'at_0.5' and, if known, 'at_dev_threshold'.
        thresholds: of each run, under 'at_0.5' and 'at_dev_threshold'.
    """

    name: str
    results: tuple[Result, ...]
    numbers: tuple[dict[str, Any], ...] = ()
    statistics: dict[str, dict[str, GroupStatistic]] = dataclasses.field(default_factory=dict)
    thresholds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def has_attention(self) -> bool:
        """True if the model learns a map that weighs its pooling."""
        return any(result.maps is not None and "weights" in result.maps.maps for result in self.results)


def group_results(results: Sequence[Result]) -> list[Group]:
    """Put runs together that differ in the seed alone.

    Raises:
        UserError: two runs of one group have the same seed.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_group_key(result), []).append(result)
    for members in groups.values():
        seeds = [member.config.get("seed") for member in members]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(member.name for member in members)
            raise UserError(f"{names} are the same model with the same seed: give runs of different seeds")
    names = _group_names(list(groups.values()))
    return [Group(name, tuple(members)) for name, members in zip(names, groups.values(), strict=True)]


def _group_key(result: Result) -> str:
    if not result.metrics:
        return str(result.path)
    shape = {name: value for name, value in result.config.items() if name != "seed"}
    shape["init.run"] = bool(shape.get("init.run"))  # each seed may start from its own run, all or none
    changes = describe_changes({}, shape)  # the fields that shape a result
    # Free to change within a run, yet not among runs that are to differ by the seed alone.
    free = result.config.get("train.num_epochs"), result.metrics.get("fingerprint")
    return json.dumps([*changes, *free, *_find_test(result).values(), result.metrics["image_size"]])


def _find_test(result: Result) -> dict[str, Any]:
    return {field: result.config.get(field, older) for field, older in TEST_FIELDS.items()}


def _group_names(groups: list[list[Result]]) -> list[str]:
    names = []
    for members in groups:
        config = members[0].config
        names.append(name_run(config) if config else members[0].name)
    sizes = {members[0].metrics["image_size"] for members in groups if members[0].metrics}
    full = []
    for name, members in zip(names, groups, strict=True):
        first = members[0]
        if len(sizes) > 1 and first.metrics:
            name += f" at {first.metrics['image_size']} px"
        full.append(name)
    return [
        name if full.count(name) == 1 else f"{name} ({_differences(members[0], groups)})"
        for name, members in zip(full, groups, strict=True)
    ]


def _differences(result: Result, groups: list[list[Result]]) -> str:
    own = {name: value for name, value in result.config.items() if name != "seed"} | _find_test(result)
    fields = set()
    for members in groups:
        fields |= {field for field, value in _find_test(members[0]).items() if value != own[field]}
        other = {name: value for name, value in members[0].config.items() if name != "seed"}
        fields |= {change.split(":")[0].removeprefix("config.") for change in describe_changes(other, own)}
    varied = [field for field in sorted(fields - set(NAMED_FIELDS)) if field in own]
    words = [f"{field.split('.')[-1]} {'none' if own[field] == '' else own[field]}" for field in varied]
    return ", ".join(words) or result.name


def compute_group(group: Group, num_resamples: int, seed: int) -> Group:
    """Return the group with its statistics: seeds combined, intervals over patients."""
    test = group.results[0].test
    scores = [result.test.score for result in group.results]
    options = {"num_resamples": num_resamples, "seed": seed}
    numbers = tuple(
        describe_predictions(
            result.test,
            result.dev,
            dev_name=result.dev_name,
            prevalences=result.config.get("eval.prevalences", PREVALENCES),
            **options,
        )
        for result in group.results
    )
    statistics = {"free": bootstrap_group(test.label, scores, test.patient, THRESHOLD_FREE, **options)}
    thresholds = {"at_0.5": [FIXED_THRESHOLD] * len(scores)}
    rows = [run["at_dev_threshold"] for run in numbers]
    if all(rows):
        thresholds["at_dev_threshold"] = [row["threshold"] for row in rows]
    for name, values in thresholds.items():
        statistics[name] = bootstrap_group(
            test.label, scores, test.patient, THRESHOLD_STATISTICS, thresholds=values, **options
        )
    return dataclasses.replace(group, numbers=numbers, statistics=statistics, thresholds=thresholds)


def describe_group(group: Group, num_resamples: int, seed: int) -> dict[str, Any]:
    """Return a group's numbers for report.json: statistics, strata, calibration, paper-like values, localisation."""
    tables = [result.boxes for result in group.results if result.boxes is not None]
    described = {
        "name": group.name,
        "runs": [result.name for result in group.results],
        "seeds": [result.config.get("seed") for result in group.results],
        "thresholds": group.thresholds,
        # Of runs that measured it; runs of older versions know no such field.
        "cardiothoracic_ratio": [(result.metrics or {}).get("cardiothoracic_ratio") for result in group.results],
    }
    for section, values in group.statistics.items():
        described[section] = {name: _describe(statistic) for name, statistic in values.items()}
    described["per_run"] = list(group.numbers)
    described["strata"] = describe_group_strata(group, num_resamples, seed)
    described["short_cuts"] = [  # of all of the report's images; runs of older versions have none
        None if result.num_left_out else (result.metrics or {}).get("short_cuts") for result in group.results
    ]
    described["localization"] = None
    if tables:
        described["localization"] = summarize_tables(tables, num_resamples=num_resamples, seed=seed)
        found = [result.metrics["localization"] for result in group.results if result.boxes is not None]
        for name in ("tuned_rules", "threshold_free"):
            described["localization"][name] = [facts.get(name) for facts in found]  # runs of older versions: none
    return described


def describe_group_strata(group: Group, num_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return `classification.describe_strata` of a group: of several runs means, with the variance between seeds."""
    test, options = group.results[0].test, {"num_resamples": num_resamples, "seed": seed}
    thresholds = group.thresholds.get("at_dev_threshold", group.thresholds["at_0.5"])
    if len(thresholds) == 1:
        return describe_strata(test, thresholds[0], **options)
    rows = describe_strata(test, thresholds[0], **options | {"num_resamples": 1})  # its counts
    for row, stratum in zip(rows, find_strata(test.label, test.attributes), strict=True):
        row["threshold"] = float(np.mean(thresholds))
        if not row["too_small"]:
            label, patient = test.label[stratum.mask], None if test.patient is None else test.patient[stratum.mask]
            scores = [result.test.score[stratum.mask] for result in group.results]
            found = bootstrap_group(label, scores, patient, STRATUM_METRICS, thresholds=thresholds, **options)
            row |= {name: short_interval(value.interval) for name, value in found.items()}
    return rows


def _describe(statistic: GroupStatistic) -> dict[str, Any]:
    return short_interval(statistic.interval) | {"values": list(statistic.values), "sd_over_seeds": statistic.sd}


def compare_all(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Compare the AUROC of each two groups on the same images."""
    comparisons = []
    for a, b in itertools.combinations(groups, 2):
        test = a.results[0].test
        paired = compare_groups(a.statistics["free"]["auroc"], b.statistics["free"]["auroc"])
        scores = [[result.test.score for result in group.results] for group in (a, b)]
        comparisons.append(
            {
                "a": a.name,
                "b": b.name,
                "bootstrap": _describe_test(paired),
                "delong": _describe_delong(test.label, *scores),
            }
        )
    return comparisons


def _describe_delong(labels: np.ndarray, *scores: list[np.ndarray]) -> dict[str, float] | None:
    if min(np.bincount(labels, minlength=2)) < 2:  # its variance needs two images of each class
        return None
    return _describe_test(compute_group_delong(labels, *scores))


def _describe_test(test: PairedTest) -> dict[str, float]:
    return short_interval(test.difference) | {"standard_error": test.standard_error, "p_value": test.p_value}


def choose_num_resamples(results: Sequence[Result]) -> int:
    """Return the most resamples that a run was tested with; the default for predictions files alone."""
    return max((result.config["eval.num_bootstrap"] for result in results if result.config), default=NUM_RESAMPLES)
