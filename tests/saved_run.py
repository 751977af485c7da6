"""A finished run on disk without training: the tiny network's first weights saved as its best state."""

import json
import pathlib

import tiny

from cxa_jax.checkpointing import Checkpoints
from cxa_jax.data.input_statistics import compute_input_statistics, save_input_statistics
from cxa_jax.run import Run, create_run
from cxa_jax.workdir import flatten_config

THRESHOLD = 0.45
PLATT = {"scale": 0.8, "bias": -0.3}


def save_run(folder: pathlib.Path, **fields) -> tuple[Run, dict]:
    """Write config.json, checkpoints/best, metrics.json and input_statistics.json; return the run and its variables."""
    dataset = tiny.make_dataset()
    run = create_run(tiny.make_config(**fields), dataset)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(run.config.to_json_best_effort())
    state = run.create_state()
    meta = {
        "progress": {"best_step": 0, "epoch": 0, "best_loss": 1.0, "history": []},
        "fingerprint": dataset.fingerprint,
        "config": flatten_config(run.config),
    }
    with Checkpoints(folder, "best") as best:
        best.save(state, meta)
    metrics = {"checkpoint": {"step": 0}, "phantom": True, "config": flatten_config(run.config)}
    metrics["test"] = {"at_dev_threshold": {"threshold": THRESHOLD}, "calibration": {"platt": PLATT}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    save_input_statistics(compute_input_statistics(dataset.splits["train"], dataset.fingerprint), folder)
    return run, state.variables
