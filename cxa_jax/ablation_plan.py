"""What an ablation has to run: the section config.ablation as poolings, strides, seeds and rules, and a config each."""

import dataclasses
import pathlib

import numpy as np
from ml_collections import ConfigDict

from cxa_jax.ablation_arms import Arm, name_iou
from cxa_jax.ablation_member import SCORES, load_scores
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import detect_boxes
from cxa_jax.metric_writer import count_rows
from cxa_jax.pooling import POOLINGS
from cxa_jax.workdir import add_younger_fields, flatten_config


@dataclasses.dataclass(frozen=True)
class Plan:
    """The axes of an ablation, read from its config.

    Attributes:
      arms: pooling by pooling, for each its strides.
      seeds: of the trainings.
      rules: threshold rules of the mean IoU.
      num_parallel: runs at a time; 0 = as many as cores, on an accelerator 1.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rules: tuple[str, ...]
    num_parallel: int


@dataclasses.dataclass(frozen=True)
class Member:
    """One run: an arm and a seed, with its config and its folder."""

    arm: Arm
    seed: int
    config: ConfigDict
    folder: pathlib.Path

    @property
    def name(self) -> str:
        """ARM-seedN, also the folder's name."""
        return self.folder.name

    def is_finished(self, fingerprint: str, rules: tuple[str, ...]) -> bool:
        """Return whether its scores are there, of this very config, these data and all `rules`.

        Config fields that are younger than the run had their defaults.
        """
        if not (self.folder / SCORES).is_file():
            return False
        columns, facts = load_scores(self.folder / SCORES)
        scored = not len(columns["boxed_patient"]) or all(f"weights/{name_iou(rule)}" in columns for rule in rules)
        same_config = add_younger_fields(facts["config"], self.config) == flatten_config(self.config)
        return same_config and scored and facts["fingerprint"] == fingerprint

    def count_epochs(self) -> int:
        """Return the finished epochs, as far as its metrics.csv tells."""
        return count_rows(self.folder / "metrics.csv")


def read_plan(config: ConfigDict) -> Plan:
    """Read config.ablation.

    Raises:
      UserError: there is no such section, or a field cannot be meant.
    """
    if "ablation" not in config:
        raise UserError("--mode=ablate needs the section config.ablation: use --config=configs/ablation.py")
    section = config.ablation
    names = _split(section.poolings)
    poolings = tuple(POOLINGS) if names == ("all",) else names
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        known = ", ".join(POOLINGS)
        raise UserError(f"config.ablation.poolings={section.poolings!r}: needed is 'all' or some of {known}")
    strides = _split(section.strides)
    if not all(name.isdecimal() and int(name) for name in strides):
        raise UserError(f"config.ablation.strides={section.strides!r}: needed are strides in px such as '32,8', or ''")
    seeds = tuple(section.seeds)
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"config.ablation.seeds={seeds}: needed is at least one whole number from 0 to {2**32 - 1}")
    rules = _split(section.rules)
    _check_rules(section.rules, rules)
    for field, values in (("poolings", poolings), ("strides", strides), ("seeds", seeds), ("rules", rules)):
        if len(set(values)) < len(values):
            raise UserError(f"config.ablation.{field} names one twice: {', '.join(map(str, values))}")
    if section.num_parallel < 0:
        raise UserError(f"config.ablation.num_parallel={section.num_parallel} must be at least 0")
    arms = tuple(Arm(pooling, stride) for pooling in poolings for stride in (map(int, strides) if strides else (None,)))
    return Plan(arms, seeds, rules, section.num_parallel)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _check_rules(field: str, rules: tuple[str, ...]) -> None:
    if not rules:
        raise UserError(f"config.ablation.rules={field!r}: needed is at least one threshold rule, such as 'half_max'")
    for rule in rules:
        try:
            detect_boxes(np.eye(2), rule)
        except UserError as error:
            raise UserError(f"config.ablation.rules={field!r}: {error}") from error


def make_members(config: ConfigDict, data_name: str, plan: Plan, folder: pathlib.Path) -> list[Member]:
    """Return the runs, seed by seed: all arms of one seed first, so that a cut ablation is a smaller one.

    PCAM shares a linear head with its map and gets one; all others have the head of the config. GeM takes positive
    features alone, so it reads F where the others read BN(F).
    """
    members = []
    for seed in plan.seeds:
        for arm in plan.arms:
            own = config.copy_and_resolve_references()
            with own.unlocked():
                del own.ablation
                own.name, own.seed, own.model.pooling = f"{arm.name}-seed{seed}", seed, arm.pooling
                own.data.name = data_name  # 'auto' could find other data later
                if arm.stride is not None:
                    own.model.stride = arm.stride
                if arm.pooling == "pcam":
                    own.model.head = "linear"
                if arm.pooling == "gem" and own.model.attended == "all_normalized":
                    own.model.attended = "normalized"
            members.append(Member(arm, seed, own, folder / own.name))
    return members
