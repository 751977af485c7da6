"""What an ablation compares: arms, each a pooling and perhaps a stride, and which of them stand against which."""

import dataclasses
from collections.abc import Sequence

REFERENCES = ("amm", "gap")  # poolings that all others of the same stride are compared with
DEFAULT_RULE = "half_max"
TITLES = {"auroc": "AUROC", "pointing": "pointing", "energy_ratio": "energy ratio"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A pooling, and the stride of its network where strides are compared; each seed of it is one run.

    Attributes:
      pooling: key of `pooling.POOLINGS`.
      stride: config.model.stride, px; None where the config's own is used by all.
    """

    pooling: str
    stride: int | None = None

    @property
    def name(self) -> str:
        """POOLING, or POOLING-strideS: in folders' names and files."""
        return self.pooling if self.stride is None else f"{self.pooling}-stride{self.stride}"

    @property
    def title(self) -> str:
        """The name, for readers."""
        return self.pooling if self.stride is None else f"{self.pooling}, stride {self.stride}"


def find_references(arms: Sequence[Arm]) -> dict[Arm, list[Arm]]:
    """Return for each arm that others are compared with those others, so that each pair differs in one thing alone.

    AMM and GAP stand against the other poolings of their stride; where there are several strides, every pooling at the
    first one stands against itself at the others.
    """
    references = {}
    for reference in sorted(arms, key=lambda arm: (*REFERENCES, arm.pooling).index(arm.pooling)):
        references[reference] = [
            arm
            for arm in arms
            if (arm.stride == reference.stride and arm.pooling != reference.pooling and reference.pooling in REFERENCES)
            or (arm.pooling == reference.pooling and reference.stride == arms[0].stride != arm.stride)
        ]
    return {reference: compared for reference, compared in references.items() if compared}


def find_step_reference(arms: Sequence[Arm]) -> Arm | None:
    """Return the arm whose step the others' are divided by: GAP, else AMM, at the first stride; None without either."""
    return next((arm for pooling in reversed(REFERENCES) for arm in arms if arm.pooling == pooling), None)


def name_iou(rule: str) -> str:
    """Return the name of the mean IoU under a threshold rule; the default's has no word of it, as in older files."""
    return "mean_iou" if rule == DEFAULT_RULE else f"mean_iou_{rule}"


def title_metrics(rules: Sequence[str]) -> dict[str, str]:
    """Return name -> title of what an ablation measures, in the order of its table: one mean IoU for each rule."""
    alone = tuple(rules) == (DEFAULT_RULE,)
    return TITLES | {name_iou(rule): "mean IoU" if alone else f"mean IoU, {rule}" for rule in rules}
