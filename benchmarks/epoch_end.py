"""How long the device waits at an epoch's end, while the host evaluates, saves and logs: as a share of 500 steps.

    python benchmarks/epoch_end.py

Trains on noise with the program's own loop. Each step is waited for, so what lies between the last step of an epoch and
the first of the next, less the time in evaluation steps, is the host's alone; training itself overlaps some of it. The
first epoch's end also compiles the evaluation step and is given apart. An epoch is a few steps here, done before the
state of the one before is written: the first waits for that, since 500 would have lasted longer, and how long is given,
too; were it longer than 500 steps, the rest would count. Writes benchmarks/results/epoch_end.json, .md.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cxa_jax.runtime import set_up_runtime  # noqa: E402

set_up_runtime()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs import dense121  # noqa: E402
from cxa_jax import train as training  # noqa: E402
from cxa_jax.background_saves import BackgroundSaves  # noqa: E402
from cxa_jax.data.fake_xrays import make_fake_dataset  # noqa: E402
from cxa_jax.run import create_run  # noqa: E402
from cxa_jax.timing import describe_host  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

NUM_STEPS = 500  # of the epoch that the wait is a share of
TARGET = 0.02


class Timed:
    """A jitted step that is waited for, after `before()`; `spans` holds (start, begin of the step, end) of every call.

    The rest of it is the step's own.
    """

    def __init__(self, step: Callable[..., Any], before: Callable[[], None] = lambda: None):
        self.step, self.before, self.spans = step, before, []

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        self.before()
        begin = time.perf_counter()
        result = jax.block_until_ready(self.step(*args))
        self.spans.append((start, begin, time.perf_counter()))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the step's median seconds, and for each epoch's end the host's alone, the evaluation's and the save's."""
    image_size, num_dev_images, num_epochs = options.image_size, options.num_dev_images, options.num_epochs
    config = dense121.get_config()
    config.data.image_size, config.train.num_epochs = image_size, num_epochs
    config.train.batch_size, config.model.dtype = options.batch_size, options.dtype
    batch_size, eval_size = config.train.batch_size, config.eval.batch_size
    dataset = make_fake_dataset(image_size, max(num_dev_images, 2 * batch_size))
    run = create_run(config.lock(), dataset)
    steps = -(-len(dataset.splits["train"].source) // batch_size)
    evals = -(-len(dataset.splits["dev"].source) // eval_size)
    opened = []

    class WatchedSaves(BackgroundSaves):
        def __enter__(self) -> BackgroundSaves:
            opened.append(self)
            return super().__enter__()

    timed = Timed(run.train_step, lambda: opened[0].wait())
    run = dataclasses.replace(run, train_step=timed, eval_step=Timed(run.eval_step))
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(training, "BackgroundSaves", WatchedSaves):
        training.train(run, pathlib.Path(folder), pathlib.Path(folder))
    starts, begins, ends = np.array(run.train_step.spans).T.reshape(3, num_epochs, steps)
    eval_starts, _, eval_ends = np.array(run.eval_step.spans).T.reshape(3, num_epochs + 1, evals)
    first, again, *others = (eval_ends - eval_starts).sum(axis=1)  # the first epoch ends with a look at other moments
    evaluation = np.array([first + again, *others])[:-1]
    saves, gaps = (begins - starts)[1:, 0], starts[1:, 0] - ends[:-1, -1]
    step_s = float(np.median((ends - begins).flat[1:]))
    host = gaps - evaluation + np.maximum(saves - NUM_STEPS * step_s, 0)
    return {
        "step_s": step_s,
        "evaluation_s": evaluation.tolist(),
        "save_s": saves.tolist(),
        "host_s": host.tolist(),
        "share": float(np.median(host[1:]) / (NUM_STEPS * step_s)),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224, help="px")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num_dev_images", type=int, default=64)
    parser.add_argument("--num_epochs", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    results = measure(options)
    environment, host = describe_environment(), describe_host()
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(
        options.output / "epoch_end.json",
        to_json(vars(options) | results | {"output": None, "environment": environment, "host": host}),
    )
    hosts, saves = (", ".join(f"{seconds:.2f}" for seconds in results[name]) for name in ("host_s", "save_s"))
    text = f"""# The end of an epoch

DenseNet-121 + AMM, batch {options.batch_size}, {options.image_size} px, {options.dtype}, {options.num_dev_images} dev
images. A step takes {results["step_s"]:.3g} s.

The host alone, s at each epoch's end: {hosts}. The first also compiles the evaluation step, and compares
batch norm's moments. Median of the others
over {NUM_STEPS} steps: **{results["share"]:.3%}** (target: less than {TARGET:.0%}). Saving went on for {saves} s
beside the next epoch's steps.

Machine: {jax.devices()[0].device_kind}, {host["processor"]}, {host["usable_cores"]} cores,
load {host["load_average"][0]:.1f} at the end;
commit {environment["commit"]}, {environment["time"]}. Command: `python {environment["command"]}`
"""
    write_atomically(options.output / "epoch_end.md", text)
    print(text)


if __name__ == "__main__":
    main()
