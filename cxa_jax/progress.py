"""What the host knows of a run between two steps: enough, with the train state, to go on as if never cut."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from cxa_jax.optimizer import (
    EarlyStopRule,
    EarlyStopState,
    PlateauRule,
    PlateauState,
    is_best,
    update_early_stop,
    update_plateau,
)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Epochs done, the two rules' records, the best epoch so far, and the running sums of the epoch under way.

    Attributes:
      epoch: finished epochs.
      plateau: record of the learning-rate rule.
      early_stop: record of the stopping rule.
      best_loss: lowest monitored dev value (a loss, or -AUROC).
      best_step: step of the state that reached it; -1 before.
      epoch_step: steps done of the epoch under way.
      loss_sum: sum over these steps of the training loss times the batch's images.
      num_images: images behind that sum.
      history: one row for each finished epoch, as in metrics.csv.
    """

    epoch: int = 0
    plateau: PlateauState = PlateauState()
    early_stop: EarlyStopState = EarlyStopState()
    best_loss: float = float("inf")
    best_step: int = -1
    epoch_step: int = 0
    loss_sum: float = 0.0
    num_images: int = 0
    history: tuple[dict[str, Any], ...] = ()

    def add_step(self, loss: float, num_images: int) -> "Progress":
        """Return the record after a step."""
        return dataclasses.replace(
            self,
            epoch_step=self.epoch_step + 1,
            loss_sum=self.loss_sum + loss * num_images,
            num_images=self.num_images + num_images,
        )

    def restart_epoch(self) -> "Progress":
        """Return the record at the start of the epoch under way."""
        return dataclasses.replace(self, epoch_step=0, loss_sum=0.0, num_images=0)

    def forget_best(self) -> "Progress":
        """Return the record with both rules and the best epoch started anew; the learning rate's scale stays."""
        plateau = PlateauState(scale=self.plateau.scale)
        return dataclasses.replace(
            self, plateau=plateau, early_stop=EarlyStopState(), best_loss=float("inf"), best_step=-1
        )

    @property
    def train_loss(self) -> float:
        """Mean training loss of the epoch under way, over images."""
        return self.loss_sum / self.num_images if self.num_images else float("nan")

    def end_epoch(self, monitored: float, step: int, row: dict[str, Any], config: ConfigDict) -> "Progress":
        """Return the record after an epoch whose monitored dev value, lower is better, is `monitored`."""
        rule = PlateauRule(config.plateau_factor, config.plateau_patience, config.plateau_min_delta)
        early_stop = EarlyStopRule(config.early_stop_patience, config.early_stop_min_delta)
        plateau = update_plateau(rule, self.plateau, monitored) if config.schedule == "plateau" else self.plateau
        best = is_best(monitored, self.best_loss)
        return Progress(
            epoch=self.epoch + 1,
            plateau=plateau,
            early_stop=update_early_stop(early_stop, self.early_stop, monitored),
            best_loss=monitored if best else self.best_loss,
            best_step=step if best else self.best_step,
            history=(*self.history, row),
        )

    def to_meta(self) -> dict[str, Any]:
        """Return the record in JSON's types."""
        return dataclasses.asdict(self) | {
            "plateau": list(self.plateau),
            "early_stop": list(self.early_stop),
            "history": list(self.history),
        }

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Progress":
        """Return the record that `to_meta` wrote."""
        return cls(
            **meta
            | {
                "plateau": PlateauState(*meta["plateau"]),
                "early_stop": EarlyStopState(*meta["early_stop"]),
                "history": tuple(meta["history"]),
            }
        )
