"""Program: one process of a tiny run; the flags are launch.py's. Run by test_distributed.py with
JAX_ENABLE_X64=1.

With --images=FILE it writes there which images of batches this process read, a line each: SPLIT ROW. With
--signal=PLACE:N it sends itself SIGTERM when it gets to one of PLACES for the N-th time.
"""

import argparse
import itertools
import os
import pathlib
import signal
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import tiny

from cxa_jax import epoch_end, figures, outputs, train
from cxa_jax import run as run_module
from cxa_jax.console import command_exits, log_to_console
from cxa_jax.data import pipeline
from cxa_jax.data.datasets import Split
from cxa_jax.distributed import joined
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.train_state import trace_initialization

PLACES = {
    "start": (train, "append_environment"),
    "training": (train, "put_batch"),
    "dev": (epoch_end, "evaluate_split"),
    "save": (train, "make_meta"),
    "predict": (outputs, "evaluate_split"),  # dev, then test
    "metrics": (outputs, "compute_run_metrics"),
}


def compute_in_double() -> None:
    """Train in float64, where anything but rounding shows; the six small steps of an epoch magnify float32's."""

    def create_model(config, *, remat=False):
        return CardioXAttentionNet(tiny.BACKBONES["tiny"](dtype=jnp.float64, implementation="fused"))

    def to_double(leaf):
        return leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf

    def double(state):
        return jax.tree.map(to_double, state)

    def trace_in_double(*args):
        traced = trace_initialization(*args)
        shapes = jax.eval_shape(double, traced.shapes)
        return SimpleNamespace(shapes=shapes, run=lambda key: double(traced.run(key)))

    run_module.create_model, run_module.trace_initialization = create_model, trace_in_double


def signal_itself(module: ModuleType, name: str, number: int) -> None:
    """Send SIGTERM at the number-th call of a function that training calls."""
    function, calls = getattr(module, name), itertools.count(1)

    def signalling(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    setattr(module, name, signalling)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--num_processes", type=int, default=0)
    parser.add_argument("--process_id", type=int, default=-1)
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--images")
    parser.add_argument("--signal", default="")
    arguments = parser.parse_args()
    log_to_console()
    reads, read_image = [], Split.read_image

    def noting_read(self: Split, row: int):
        if sys._getframe(1).f_code.co_filename == pipeline.__file__:  # of a batch, not of a picture or statistics
            reads.append(f"{self.name} {row}")
        return read_image(self, row)

    Split.read_image = noting_read
    figures.save_augmentation_grid = lambda run, path: None  # it reads batches of its own
    run_module.load_dataset = lambda config: tiny.make_dataset()
    compute_in_double()
    if arguments.signal:
        place, _, number = arguments.signal.partition(":")
        signal_itself(*PLACES[place], int(number))
    with command_exits(), joined(arguments.coordinator, arguments.num_processes, arguments.process_id, auto=False):
        train.train_and_evaluate(tiny.make_config(**{"train.num_epochs": arguments.num_epochs}), arguments.workdir)
        if arguments.images:
            pathlib.Path(arguments.images).write_text("\n".join(reads))


if __name__ == "__main__":
    main()
