"""A real run in seconds: the smallest DenseNet, images in memory. Imported by tests, and run by them as a program."""

import argparse
import os
import pathlib
import signal
import sys
from functools import partial

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import common
from cxa_jax import run as run_module
from cxa_jax.console import log_to_console
from cxa_jax.data.datasets import Dataset, Split
from cxa_jax.models import BACKBONES
from cxa_jax.models.densenet import DenseNet

SIZE = 64
BACKBONES.setdefault("tiny", partial(DenseNet, num_layers=(1, 1, 1, 1)))


def make_config(**fields):
    """Return a config for `make_dataset`; fields as 'train.num_epochs'=3."""
    config = common.get_config("tiny", "densenet121")
    config.model.backbone = "tiny"
    config.data.image_size = SIZE
    config.train.batch_size = 8
    config.train.num_epochs = 3
    config.eval.batch_size = 8
    config.eval.num_bootstrap = 50
    config.optimizer.learning_rate = 0.01
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    return config.lock()


def make_split(name: str, num_images: int, seed: int, size: int) -> Split:
    """Return noise images; positives have a bright box, which is also their true box and heart."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num_images):
        label = int(rng.random() < 0.4) if i > 3 else i % 2
        image = rng.integers(0, 180, (size, size, 1)).astype(np.uint8)
        heart = np.zeros((size, size, 1), np.uint8)
        heart[20:44, 28:52] = 1
        image[heart == 1] += np.uint8(70 * label)
        records.append(
            {
                "image": image,
                "id": f"{name}{i:03d}",
                "patient": f"{name}{i // 2}",
                "label": label,
                "findings": "Cardiomegaly" if label else "No Finding",
                "view": "PA",
                "sex": "F",
                "age": 50,
                "boxes": np.array([[28, 20, 24, 24]], np.float32),
                "heart_mask": heart,
            }
        )
    fields = ("id", "patient", "label", "view", "sex", "age", "findings")
    index = {field: np.array([record[field] for record in records]) for field in fields}
    index["label"] = index["label"].astype(np.int32)
    return Split(name, records, index)


def make_dataset(seed: int = 0, size: int = SIZE) -> Dataset:
    """Return 44 train, 13 dev and 19 test images: no multiple of the batch."""
    counts = {"train": 44, "dev": 13, "test": 19}
    splits = {name: make_split(name, count, seed + i, size) for i, (name, count) in enumerate(counts.items())}
    return Dataset("chest_phantom", size, splits, f"fingerprint{seed}", "tiny images")


def main() -> None:
    """Train in --workdir; with --kill_at_step die by SIGKILL when that many steps of this process were dispatched."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--kill_at_step", type=int, default=-1)
    parser.add_argument("--checkpoint_every_steps", type=int, default=0)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    arguments = parser.parse_args()
    log_to_console()
    run_module.load_dataset = lambda config: make_dataset()
    jit, calls = run_module.jax.jit, []

    def counting_jit(function, **options):
        compiled = jit(function, **options)
        if getattr(function, "__name__", "") != "train_step":
            return compiled

        def call(*args):
            if len(calls) == arguments.kill_at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            return compiled(*args)

        call.lower = compiled.lower
        return call

    run_module.jax.jit = counting_jit
    from cxa_jax.train import train_and_evaluate

    config = make_config(
        **{
            "train.checkpoint_every_steps": arguments.checkpoint_every_steps,
            "train.num_epochs": arguments.num_epochs,
            "optimizer.learning_rate": arguments.learning_rate,
        }
    )
    train_and_evaluate(config, arguments.workdir)


if __name__ == "__main__":
    main()
