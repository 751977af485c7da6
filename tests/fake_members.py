"""Stand-ins for the processes of an ablation: they write what a run would, in no time, and import no jax."""

import json
import pathlib

import numpy as np

SKILL = {"amm": 2.0, "gap": 1.0}  # how far the positives' logits lie above the negatives'; others: not
NUM_IMAGES = 60


def flatten_config(config):
    """Return what `cxa_jax.workdir.flatten_config` does for sections of depth one."""
    nodes = json.loads(config.to_json_best_effort())
    flat = {name: value for name, value in nodes.items() if not isinstance(value, dict)}
    for section, node in nodes.items():
        if isinstance(node, dict):
            for name, value in node.items():
                children = value.items() if isinstance(value, dict) else [(None, value)]
                flat |= {f"{section}.{name}" + (f".{child}" if child else ""): value for child, value in children}
    return flat


def train(config, workdir, rules):
    """Write scores as `ablation_member.train_member` does; refuse once where a file `refuse` lies beside the runs."""
    folder = pathlib.Path(workdir)
    if config.model.pooling == "gmp" and (folder.parent / "refuse").exists():
        raise ValueError("this pooling is broken")
    (folder / "metrics.csv").write_text("epoch\n1\n")
    with (folder / "calls.txt").open("a") as file:
        file.write("called\n")
    label = np.arange(NUM_IMAGES) % 2
    rng = np.random.default_rng([config.seed, config.model.stride])
    columns = {
        "id": np.array([f"image{i}" for i in range(NUM_IMAGES)]),
        "patient": np.array([f"patient{i // 2}" for i in range(NUM_IMAGES)]),
        "label": label,
        "logit": SKILL.get(config.model.pooling, 0.0) * label + rng.normal(size=NUM_IMAGES),
        "boxed_patient": np.array([f"patient{i}" for i in range(NUM_IMAGES // 2)]),
    }
    for name in ("weights", "random_map", "image_centre", "median_box"):
        ious = ["mean_iou" if rule == "half_max" else f"mean_iou_{rule}" for rule in rules]
        for metric in ("pointing", "energy_ratio", *ious):
            skill = SKILL.get(config.model.pooling, 0.0)
            columns[f"{name}/{metric}"] = rng.random(NUM_IMAGES // 2) ** (1 / (1 + skill))
    columns["image_centre/energy_ratio"] = np.full(NUM_IMAGES // 2, np.nan)
    facts = {
        "config": flatten_config(config),
        "fingerprint": "fingerprint0",
        "description": "tiny images [here]",
        "best_epoch": 1,
        "wall_s": 1.5,
        "environment": {"commit": "abc"},
    }
    np.savez(folder / "ablation_scores.npz", facts=np.array(json.dumps(facts)), **columns)


def time_steps(configs, path):
    """Write step times as `ablation_member.measure_step_times` does: AMM takes a tenth more than GAP."""
    seconds = {name: [0.11, 0.22, 0.33] if name.startswith("amm") else [0.1, 0.2, 0.3] for name in configs}
    flat = {name: flatten_config(config) for name, config in configs.items()}
    pathlib.Path(path).write_text(json.dumps({"seconds": seconds, "configs": flat, "environment": {}}))
