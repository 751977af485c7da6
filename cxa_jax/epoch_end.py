"""An epoch's end: fit the moments, evaluate the dev split, add the epoch's row, update plateau and early stop."""

import logging
import time
from typing import Any

import numpy as np

from cxa_jax.array_types import PyTree
from cxa_jax.attention_statistics import describe_attention, summarize_attention
from cxa_jax.evaluate import Predictions, compute_loss, evaluate_split
from cxa_jax.moments import fit_moments
from cxa_jax.progress import Progress
from cxa_jax.run import Run
from cxa_jax.train_state import TrainState

log = logging.getLogger(__name__)

NUM_CHECKED = 8  # training batches whose moments show, after the first epoch, whether the running ones lag behind
TOLERATED = 0.2  # of the dev loss: how far off it may be by the running moments
SUGGESTED = 24  # training batches: what the warning advises


def end_epoch(run: Run, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Return the state with moments that fit it, if asked, and the record with the epoch's row.

    The first epoch's row has the dev loss with the other moments too, so that it is looked at once in a run.
    """
    from cxa_jax.metrics import compute_auroc

    start = time.perf_counter()
    config = run.config
    num_fitted = config.train.recompute_moments
    if num_fitted:
        fitted = fit_moments(run, state.variables, progress.epoch, num_fitted)
        state = state.replace(fitted_stats=fitted["batch_stats"])
    predictions = predict_dev(run, state.variables)
    finite = bool(np.isfinite(predictions.logit).all())
    row = {
        "epoch": progress.epoch + 1,
        "step": int(state.step),
        "learning_rate": run.rate_at(int(state.step) - 1, progress.plateau.scale),  # of the epoch's last step
        "train_loss": progress.train_loss,
        "dev_loss": compute_loss(predictions),
        "dev_loss_weighted": compute_loss(predictions, run.class_weights),
        "dev_auroc": compute_auroc(predictions.label, predictions.logit) if finite else float("nan"),
        "data": run.dataset.name,
    }
    if predictions.attention_logits is not None:
        attention = summarize_attention(predictions.attention_logits, predictions.attention, predictions.weights)
        row |= attention
        log.info("attention on dev: %s", describe_attention(attention, predictions.weights[0].size))
    if progress.epoch == 0:
        row |= compare_moments(run, state, row["dev_loss"])
    monitored = -row["dev_auroc"] if config.train.select_by == "dev_auroc" else row[config.train.select_by]
    ended = progress.end_epoch(monitored, row["step"], row, config.optimizer)
    log.info(
        "epoch %d: train loss %.4f, dev loss %.4f, dev AUROC %.4f, learning rate %.3g (dev took %.1f s)%s",
        row["epoch"], row["train_loss"], row["dev_loss"], row["dev_auroc"], row["learning_rate"],
        time.perf_counter() - start, ", best so far" if ended.best_step == row["step"] else "",
    )  # fmt: skip
    return state, ended


def predict_dev(run: Run, variables: dict[str, PyTree]) -> Predictions:
    """Predict the dev split."""
    return evaluate_split(
        run.eval_step,
        variables,
        run.dataset.splits["dev"],
        run.mesh,
        batch_size=run.config.eval.batch_size,
        num_threads=run.config.data.num_threads,
        show_progress=False,
    )


def compare_moments(run: Run, state: TrainState, dev_loss: float) -> dict[str, Any]:
    """Return the dev loss with the moments that are not in use, and warn if the running ones in use lag behind.

    Recomputed ones are in use if config.train.recompute_moments asks for them; else they are those of NUM_CHECKED
    batches.
    """
    if run.config.train.recompute_moments:
        running = compute_loss(predict_dev(run, state.variables | {"batch_stats": state.batch_stats}))
        log.info("dev loss with recomputed moments %.4f, with running moments %.4f", dev_loss, running)
        return {"dev_loss_running_moments": running}
    fitted = fit_moments(run, state.variables, epoch=0, num_batches=NUM_CHECKED)
    recomputed = compute_loss(predict_dev(run, fitted))
    if np.isfinite(recomputed) and not abs(dev_loss - recomputed) <= TOLERATED * recomputed:  # also true of nan
        log.warning(
            "batch norm's running moments lag behind the weights: dev loss %.4f with them, %.4f with moments of %d "
            "training batches. Set --config.train.recompute_moments=%d, or a --config.model.batch_norm_momentum below "
            "%g; until then the dev values, and the state chosen by them, are read through stale moments",
            dev_loss, recomputed, NUM_CHECKED, SUGGESTED, run.config.model.batch_norm_momentum,
        )  # fmt: skip
    return {"dev_loss_recomputed_moments": recomputed}
