"""This project: the train step of cxa_jax.run, fed with grey bytes, and the network's score alone.

Augmentation is off, for no peer has it in its step; the way from bytes to normalised RGB is in.
"""

import contextlib
import os
import pathlib
import sys

from protocol import LEARNING_RATE, MOMENTUM, RUN_STEPS, parse_arguments, serve

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
arguments = parse_arguments(
    implementation=("auto", "plain", "fused", "kernels"),
    dtype=("float32", "bfloat16"),
    host_devices=("launcher", "1", "4", "8"),
)
if arguments.host_devices != "launcher":
    os.environ["JAX_NUM_CPU_DEVICES"] = arguments.host_devices

from cxa_jax.garbage import keeping_garbage  # noqa: E402

with keeping_garbage():  # as launch.py imports them; jax reads JAX_NUM_CPU_DEVICES
    import jax
    import numpy as np

    from configs import common
    from cxa_jax.data.augment import normalize_images, to_rgb
    from cxa_jax.data.fake_xrays import make_fake_dataset
    from cxa_jax.run import Run, create_run
    from cxa_jax.runtime import set_up_runtime
    from cxa_jax.sharding import put_batch, replicated, split
    from cxa_jax.warm_up import compiling_train_step


def build_run() -> Run:
    """Return the run of this program's flags, on noise."""
    config = common.get_config("compare", arguments.backbone)
    config.augment.enabled = False
    config.data.image_size = arguments.image_size
    config.train.batch_size = arguments.batch_size
    config.model.implementation = arguments.implementation
    config.model.dtype = arguments.dtype
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (LEARNING_RATE, MOMENTUM)
    return create_run(config.lock(), make_fake_dataset(arguments.image_size, 4))


set_up_runtime()
run = build_run()
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (arguments.batch_size, arguments.image_size, arguments.image_size, 1), np.uint8)
labels = np.arange(arguments.batch_size, dtype=np.int32) % 2
with compiling_train_step(run) if arguments.first.startswith("train") else contextlib.nullcontext():  # as training does
    state = run.create_state()
rate_scale = jax.device_put(np.float32(1), replicated(run.mesh))


def put() -> dict[str, jax.Array]:
    """Put the batch on the device."""
    return put_batch({"image": images, "label": labels, "mask": np.ones(arguments.batch_size, bool)}, run.mesh)


def train() -> float:
    """Run one step from a batch on the host to its loss on the host."""
    global state
    batch = put()
    state, metrics = run.train_step(state, batch, rate_scale, run.root_key)
    return float(metrics["loss"])


def make_train_run():
    """Return a call of RUN_STEPS steps in a row on one batch that lies on the device, the last one's loss fetched."""
    batch = put()

    def train_run() -> float:
        global state
        for _ in range(RUN_STEPS):
            state, metrics = run.train_step(state, batch, rate_scale, run.root_key)
        return float(metrics["loss"])

    return train_run


def make_predict(batch_size: int):
    """Return a call from a batch on the host to its scores on the host; on one device where several do not divide."""
    divides = batch_size % run.mesh.size == 0
    sharding = split(run.mesh) if divides else jax.devices()[0]

    def score(variables, images):
        logits, _ = run.model.apply(variables, to_rgb(normalize_images(images, "min_max"), "min_max"), train=False)
        return jax.nn.sigmoid(logits)

    jitted, variables = jax.jit(score), []

    def predict() -> np.ndarray:
        if not variables:  # copied once: training donates the state's own arrays
            copied = jax.tree.map(np.array, state.variables)
            variables.append(jax.device_put(copied, replicated(run.mesh) if divides else sharding))
        return np.asarray(jitted(variables[0], jax.device_put(images[:batch_size], sharding)))

    return predict


serve(
    arguments.first,
    {
        "train": train,
        "train_run": make_train_run(),
        "predict": make_predict(arguments.batch_size),
        "predict_one": make_predict(1),
    },
    {
        "jax": jax.__version__,
        "graph": run.model.backbone.implementation,
        "device": jax.devices()[0].device_kind,
        "devices": run.mesh.size,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    },
)
