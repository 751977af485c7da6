"""The host's record of a run: sums over an epoch, the best epoch, and a trip through JSON."""

import json
import math

from configs import dense121
from cxa_jax.progress import Progress

OPTIMIZER = dense121.get_config().optimizer


def test_train_loss_is_a_mean_over_images_not_batches():
    progress = Progress().add_step(1.0, 8).add_step(4.0, 2)
    assert progress.train_loss == (8 + 8) / 10
    assert progress.epoch_step == 2
    assert math.isnan(Progress().train_loss)


def test_best_is_the_first_of_ties_and_never_nan():
    progress, steps = Progress(), []
    for epoch, loss in enumerate((math.nan, 0.5, 0.4, 0.4, math.nan, 0.6)):
        progress = progress.add_step(1.0, 1).end_epoch(loss, 10 * epoch, {"epoch": epoch}, OPTIMIZER)
        steps.append(progress.best_step)
    assert steps == [-1, 10, 20, 20, 20, 20]
    assert progress.best_loss == 0.4
    assert (progress.epoch, progress.epoch_step, progress.num_images) == (6, 0, 0)
    assert [row["epoch"] for row in progress.history] == list(range(6))


def test_round_trip_through_json():
    progress = Progress().end_epoch(0.5, 3, {"epoch": 1, "dev_auroc": math.nan}, OPTIMIZER).add_step(2.0, 4)
    again = Progress.from_meta(json.loads(json.dumps(progress.to_meta())))
    assert repr(again) == repr(progress)
    assert again.end_epoch(0.4, 6, {}, OPTIMIZER).best_step == 6


def test_forgetting_the_best_starts_the_rules_anew_but_keeps_the_rate():
    progress = Progress()
    for _ in range(16):
        progress = progress.end_epoch(0.5, 3, {}, OPTIMIZER)
    forgotten = progress.forget_best()
    assert forgotten.plateau.scale == progress.plateau.scale == 0.3
    assert forgotten.end_epoch(0.9, 7, {}, OPTIMIZER).best_step == 7


def test_restarted_epoch_forgets_its_steps():
    progress = Progress().end_epoch(0.5, 3, {}, OPTIMIZER).add_step(2.0, 4).restart_epoch()
    assert (progress.epoch, progress.epoch_step, progress.loss_sum, progress.num_images) == (1, 0, 0.0, 0)
