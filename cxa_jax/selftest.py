"""Does this installation compute what it should? A fixed small network on fixed phantoms against stored numbers.

The weights are drawn from NumPy's Philox bits, which are the same everywhere; the images and the expected outputs lie
in selftest_values.npz beside this file. `write_values` made it, on a CPU, by the plain graph.
"""

import functools
import logging
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from cxa_jax.array_types import PyTree
from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.data.phantom import PhantomSpec
from cxa_jax.data.phantom_render import draw
from cxa_jax.errors import UserError
from cxa_jax.losses import weighted_binary_cross_entropy
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.kernel_tiles import is_available
from cxa_jax.steps import make_eval_step

log = logging.getLogger(__name__)

VALUES = pathlib.Path(__file__).with_name("selftest_values.npz")
NUM_IMAGES, SIZE, TRAIN_BATCH = 6, 96, 16
OUTPUTS = ("logit", "score", "attention", "evidence")
IMPLEMENTATIONS = ("plain", "fused")
# Absolute. CPUs differ in the order of sums; accelerators may round the factors of products to 10 bits (TF32).
TOLERANCES = {"cpu": 1e-4}
ACCELERATOR_TOLERANCE = 5e-3
GRADIENT_TOLERANCE = 5e-3  # relative, everywhere: a ReLU that rounding opens here and closes there is .1 % of them
MAX_LEVELS = 1  # grey levels by which a phantom drawn here may differ from the stored one


def selftest() -> dict[str, float]:
    """Compare phantoms, scores, attention and evidence of both graphs with the stored values, and log each.

    Then what training would use here, gradients and batch statistics of the fast graph, with those of the plain one:
    the only check of the GPU kernels that runs on a GPU.

    Returns:
      The greatest absolute difference of each comparison, and the relative one of gradients, by its name.

    Raises:
      UserError: one is beyond its tolerance: numbers from this installation are not to be trusted.
    """
    started, device = time.monotonic(), jax.devices()[0]
    tolerance = TOLERANCES.get(device.platform, ACCELERATOR_TOLERANCE)
    with np.load(VALUES, allow_pickle=False) as stored:
        values = dict(stored)
    log.info("device: %s (%s); tolerance %g, absolute", device.device_kind, device.platform, tolerance)
    differences = {"phantoms, grey levels": _differ(draw_images(), values["images"])}
    allowed = {"phantoms, grey levels": MAX_LEVELS}
    for implementation in IMPLEMENTATIONS:
        outputs = compute_outputs(values["images"], implementation)
        for name in OUTPUTS:
            differences[f"{name}, {implementation} graph"] = _differ(outputs[name], values[name])
            allowed[f"{name}, {implementation} graph"] = tolerance
    expected = compute_gradients(values["images"], "plain")
    fast = "kernels" if is_available() else "fused"
    for name, found in compute_gradients(values["images"], fast).items():
        named = f"{name}, {fast} graph, relative"
        differences[named] = float(np.linalg.norm(found - expected[name]) / np.linalg.norm(expected[name]))
        allowed[named] = GRADIENT_TOLERANCE
    failed = [name for name, difference in differences.items() if not difference <= allowed[name]]  # a nan fails
    for name, difference in differences.items():
        log.info("  %-26s differs by %.2g  %s", name, difference, "TOO MUCH" if name in failed else "ok")
    if failed:
        raise UserError(
            f"selftest failed on {device.device_kind}: {', '.join(failed)} beyond {tolerance:g}. Install what "
            "requirements.txt pins, and unset XLA_FLAGS and JAX_* variables; do not publish numbers from this machine"
        )
    log.info("selftest passed on %s in %.0f s", device.device_kind, time.monotonic() - started)
    return differences


def draw_images() -> np.ndarray:
    """Draw the fixed phantoms, uint8 [N, S, S]."""
    spec = PhantomSpec(preset="hard", prevalence=0.5, label_noise=0.0, seed=0)
    return np.stack([draw(spec, SIZE, (patient, 0)).image for patient in range(NUM_IMAGES)])


def compute_outputs(images: np.ndarray, implementation: str) -> dict[str, np.ndarray]:
    """Return OUTPUTS of the fixed network for images uint8 [N, S, S], on the present device."""
    model = CardioXAttentionNet(DenseNet(num_layers=(1, 1, 1, 1), implementation=implementation))
    step = jax.jit(make_eval_step(model, "min_max"))
    out = {name: np.asarray(value) for name, value in step(draw_variables(model), images[..., None]).items()}
    return out | {"score": 1 / (1 + np.exp(-out["logit"]))}


def compute_gradients(images: np.ndarray, implementation: str) -> dict[str, np.ndarray]:
    """Return the fixed network's gradients of a training loss, and its new batch statistics, each as one vector.

    In float32 throughout, on images uint8 [N, S, S] and their mirror images, as many as fill the kernels' tiles.
    """
    images = np.resize(np.concatenate([images, images[..., ::-1]]), (TRAIN_BATCH, *images.shape[1:]))[..., None]
    model = CardioXAttentionNet(DenseNet(num_layers=(2, 2, 2, 2), implementation=implementation), dropout=0.0)
    variables, labels = draw_variables(model), np.arange(TRAIN_BATCH) % 2

    def loss(params: PyTree, images: jax.Array) -> tuple[jax.Array, PyTree]:
        inputs = to_rgb(normalize_images(images, "min_max"), "min_max")
        (logits, _), updated = model.apply(variables | {"params": params}, inputs, train=True, mutable=["batch_stats"])
        return weighted_binary_cross_entropy(logits, labels, (1.0, 1.0)).mean(), updated

    with jax.default_matmul_precision("highest"):
        gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], images)
    parts = {"gradients": gradients, "batch statistics": updated}
    return {
        name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
        for name, tree in parts.items()
    }


def draw_variables(model: CardioXAttentionNet) -> PyTree:
    """Draw the variables of a network."""
    init = functools.partial(model.init, train=False)
    return draw_weights(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))))


def draw_weights(abstract: PyTree) -> PyTree:
    """Draw weights for the shapes of `abstract`, each array from bits keyed by its name."""

    def draw_array(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits = np.random.Philox(key=np.array([0, zlib.crc32(name.encode())], np.uint64)).random_raw(leaf.size)
        unit = ((bits >> np.uint64(11)) * 2.0**-53).reshape(leaf.shape)  # [0, 1)
        signed = 2 * unit - 1
        match name.split("/")[-1]:
            case "kernel":
                values = signed * np.sqrt(6 / np.prod(leaf.shape[:-1]))
            case "scale" | "var":
                values = 1 + 0.5 * signed
            case _:
                values = 0.1 * signed
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_array, dict(abstract))


def write_values(path: pathlib.Path = VALUES) -> None:
    """Write the stored values anew; for developers, after a change that is meant to change them, on a CPU."""
    images = draw_images()
    outputs = compute_outputs(images, "plain")
    np.savez_compressed(path, images=images, **{name: outputs[name] for name in OUTPUTS})


def _differ(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(values.astype(np.float64) - expected).max())
