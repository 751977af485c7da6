"""What a run's boxes say of the map that answers for it: its overlap and pointing, and how much of it is only prior."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cxa_jax.localization_table import GAINS, MEAN_MAP, RANDOM_WEIGHTS, SHUFFLED, find_judged_rules, find_leading_map
from cxa_jax.scored_maps import THUMBNAIL, title_map

CONTROL_TITLES = {
    "median_box": "the median box of other patients",
    THUMBNAIL: "the image's thumbnail",
    MEAN_MAP: "its mean map of training images",
    SHUFFLED: "the map of another patient",
    RANDOM_WEIGHTS: "the map of random weights",
}
MORAL = "A map that does not beat these has shown nothing."


@dataclass(frozen=True)
class Verdict:
    """The map that answers, held against each control it has.

    Attributes:
        name: of the map.
        rule: that its boxes are cut by.
        metrics: its own, metric -> interval or None.
        gains: control -> (gain in IoU, gain in pointing), intervals, the second None where it is not defined.
    """

    name: str
    rule: str
    metrics: Mapping[str, Any]
    gains: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]]

    @property
    def title(self) -> str:
        """What a reader calls the map."""
        return title_map(self.name)

    @property
    def answer(self) -> str:
        """One sentence: which controls it overlaps better than, and which it does not."""
        groups: dict[str, list[str]] = {"better than": [], "no better than": [], "worse than": []}
        for control, (iou, _) in self.gains.items():
            verdict = "better than" if iou["low"] > 0 else "worse than" if iou["high"] < 0 else "no better than"
            groups[verdict].append(CONTROL_TITLES[control])
        said = [f"{verdict} {_enumerate(controls)}" for verdict, controls in groups.items() if controls]
        return f"boxes of {self.title} overlap {', '.join(said)}"


def judge(rules: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Verdict]:
    """Return the verdicts on what leads under each judged rule; none of a rule without a control of its overlap.

    Args:
        rules: rule -> map -> metric -> {estimate, low, high} or None, as `summarize_tables` gives them.
    """
    verdicts = [_judge_leading(rule, rules[rule]) for rule in find_judged_rules(rules)]
    return [verdict for verdict in verdicts if verdict.gains]


def _judge_leading(rule: str, maps: Mapping[str, Mapping[str, Any]]) -> Verdict:
    name = find_leading_map(maps)
    metrics = maps[name]
    gains = {
        control: (metrics[columns[0]], metrics[columns[1]])
        for control, columns in GAINS.items()
        if all(column in metrics for column in columns) and _is_known(metrics[columns[0]])
    }
    return Verdict(name, rule, metrics, gains)


def _is_known(interval: Mapping[str, float | None] | None) -> bool:
    return interval is not None and interval["low"] is not None and math.isfinite(interval["low"])


def _enumerate(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
