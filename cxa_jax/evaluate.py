"""Run the network over a split: one row for every image, none dropped, in the split's order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import expit

from cxa_jax import interruption
from cxa_jax.array_types import PyTree
from cxa_jax.console import progress_bar
from cxa_jax.data.datasets import Split
from cxa_jax.data.pipeline import make_eval_iterator
from cxa_jax.device_memory import naming_exhaustion
from cxa_jax.predictions import ATTRIBUTES, PredictionTable
from cxa_jax.sharding import own_rows, put_batch

MAPS = ("attention", "weights", "evidence", "cam", "grad_cam")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the network says of each image of a split.

    Attributes:
      split: the split's name.
      index: id, patient, view, sex, age, findings [N].
      label: int32 [N].
      logit: float32 [N].
      attention: W, float32 [N, h, w] in [0, 1].
      evidence: class-evidence map, float32 [N, h, w], in logits: its sum is the share of the pooled features.
      weights: p of the pooling, averaged over channels where each has its own, float32 [N, h, w], non-negative.
      grad_cam: Grad-CAM through pooling and head, float32 [N, h, w].
      attention_logits: z, float32 [N, h, w]; None where the pooling reads features alone.
      cam: class-activation map, linearised unless the head is linear, float32 [N, h, w].
      finding_logits: float32 [N, 14], of the findings in their order; None unless the network has a map for each.
    """

    split: str
    index: dict[str, np.ndarray]
    label: np.ndarray
    logit: np.ndarray
    attention: np.ndarray
    evidence: np.ndarray
    weights: np.ndarray
    grad_cam: np.ndarray | None = None
    attention_logits: np.ndarray | None = None
    cam: np.ndarray | None = None
    finding_logits: np.ndarray | None = None

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """The maps by name, [N, h, w] each, without those that say nothing: one value in every cell of every image."""
        named = {name: getattr(self, name) for name in MAPS}
        return {name: maps for name, maps in named.items() if maps is not None and np.ptp(maps) > 0}

    def to_table(self) -> PredictionTable:
        """Return id, label, score, patient, logit and attributes, as predictions_NAME.csv has them."""
        attributes = {name: self.index[name] for name in ATTRIBUTES if name in self.index}
        logit = self.logit.astype(np.float64)
        return PredictionTable(self.index["id"], self.label, self.score, self.index["patient"], logit, attributes)

    @property
    def score(self) -> np.ndarray:
        """Probability of cardiomegaly, float64 [N]."""
        return expit(self.logit.astype(np.float64))


def evaluate_split(
    eval_step: Callable[[PyTree, Any], dict[str, jax.Array]],
    variables: PyTree,
    split: Split,
    mesh: Mesh,
    *,
    batch_size: int,
    num_threads: int,
    show_progress: bool = True,
) -> Predictions:
    """Predict every image of `split`.

    Raises:
      UserError: the device ran out of memory.
      Interrupted: a signal asked the process to end.
      RuntimeError: the number of rows that came out is not the number of images: a bug, never to be averaged over.
    """
    rows, outputs, pending = [], [], None

    def collect(batch: dict[str, np.ndarray], out: dict[str, jax.Array]) -> None:
        mask = batch["mask"]
        rows.append(batch["index"][mask])
        outputs.append({name: np.asarray(value)[mask] for name, value in out.items()})

    memory = naming_exhaustion(f"config.eval.batch_size={batch_size}", "lower --config.eval.batch_size")
    with memory, progress_bar(len(split.source), f"predict {split.name}", disable=not show_progress) as bar:
        own = own_rows(batch_size, mesh)
        for batch in make_eval_iterator(split, batch_size=batch_size, num_threads=num_threads, own_rows=own):
            if jax.process_count() == 1:  # one of several must not leave the others: training ends them all, later
                interruption.check()
            out = eval_step(variables, put_batch(batch["image"], mesh))
            if pending is not None:  # fetched while the device works on the next batch
                collect(*pending)
            pending = batch, out
            bar.update(int(batch["mask"].sum()))
        if pending is not None:
            collect(*pending)

    order = np.concatenate(rows) if rows else np.zeros(0, int)
    if not np.array_equal(order, np.arange(len(split.source))):
        raise RuntimeError(f"{split.name}: {len(order)} rows for {len(split.source)} images, or out of order")
    merged = {name: np.concatenate([out[name] for out in outputs]) for name in outputs[0]}
    return Predictions(split.name, split.index, np.asarray(split.index["label"]), **merged)


def compute_loss(predictions: Predictions, class_weights: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return the mean binary cross-entropy over images (Eq. (1)), in float64; weights as in training if given."""
    logit, label = predictions.logit.astype(np.float64), predictions.label
    w_neg, w_pos = class_weights
    losses = np.where(label == 1, w_pos * np.logaddexp(0, -logit), w_neg * np.logaddexp(0, logit))
    return float(losses.mean())
