"""A whole training run against Keras: same weights, same batches, no augmentation, no dropout, SGD with momentum."""

import keras_reference as reference  # first: it chooses Keras' backend

# isort: split
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from literal_graph import LAYERS, as_ours, attention_and_head

from configs import common
from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.models.backbones import BACKBONES
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.keras_import import PLACES
from cxa_jax.models.keras_layout import keras_layers
from cxa_jax.optimizer import create_optimizer
from cxa_jax.steps import make_train_step
from cxa_jax.train_state import TrainState

NUM_STEPS, BATCH_SIZE, SIZE = 20, 8, 64
LEARNING_RATE, MOMENTUM = 0.01, 0.9
CLASS_WEIGHTS = (0.6, 3.0)
SMALL = (1, 2, 1, 1)
TOLERANCE = 1e-9  # float64: rounding, grown over the steps


def draw_batches():
    rng = np.random.default_rng(7)
    for _ in range(NUM_STEPS):
        images = rng.integers(0, 256, (BATCH_SIZE, SIZE, SIZE, 1), np.uint8)
        yield images, rng.permutation(BATCH_SIZE).astype(np.int32) % 2


def variables_of(model, backbone):
    """Arrange the Keras model's variables as ours, in double precision."""
    head = [v for v in model.variables if v.path.split("/")[0] in LAYERS]
    ours = as_ours([v.path for v in head], [v.value for v in head])
    values = {v.path: np.asarray(v.value) for v in model.variables}
    for layer in keras_layers(backbone):
        for role, (top, leaf) in PLACES[layer.kind].items():
            if f"{layer.name}/{role}" in values:
                node = ours[top].setdefault("backbone", {})
                for key in layer.path:
                    node = node.setdefault(key, {})
                node[leaf] = values[f"{layer.name}/{role}"]
    return ours


def largest_difference(ours, theirs):
    """Return the largest |a - b| / (|a| + |b|), norms of whole arrays, and the array's path."""
    norm = np.linalg.norm
    differences = jax.tree.map(lambda a, b: float(norm(a - b) / max(norm(a) + norm(b), 1e-30)), ours, theirs)
    return max((value, jax.tree_util.keystr(path)) for path, value in jax.tree_util.tree_leaves_with_path(differences))


def small_densenet():
    return DenseNet(SMALL), reference.create_small_densenet(SMALL, np.random.default_rng(0))


def densenet121():
    return BACKBONES["densenet121"](), reference.create_application("densenet121", np.random.default_rng(0))


@pytest.mark.slow  # test_keras_parity.py has the gradients, test_steps.py and test_optimizer.py the rest
@pytest.mark.parametrize("create", [small_densenet, densenet121])
def test_twenty_steps_of_sgd(create):
    with reference.double_precision():
        backbone, keras_backbone = create()
        model = keras.Model(keras_backbone.input, attention_and_head(keras_backbone.output)[0])
        model.compile(optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), loss="binary_crossentropy")
        network = CardioXAttentionNet(backbone.clone(dtype=jnp.float64), dropout=0.0)
        tx = create_optimizer(LEARNING_RATE, MOMENTUM)
        augment_config = common.get_config("parity", "densenet121").augment
        augment_config.enabled = False
        step = jax.jit(make_train_step(network, tx, jax.random.key(0), CLASS_WEIGHTS, "div255", augment_config))
        initial = variables_of(model, backbone)
        state = TrainState(
            jnp.zeros((), jnp.int32), jnp.ones((), bool), **initial, opt_state=tx.init(initial["params"])
        )
        # Compiled as in the step: op by op, a pixel's last bit differs, and in float64 that would show.
        normalize = jax.jit(lambda images: to_rgb(normalize_images(images, "div255"), "div255"))
        losses, their_losses = [], []
        for images, labels in draw_batches():
            pixels = np.asarray(normalize(images), np.float64)
            weights = np.where(labels == 1, CLASS_WEIGHTS[1], CLASS_WEIGHTS[0])
            their_loss = model.train_on_batch(pixels, labels[:, None].astype(np.float64), sample_weight=weights)
            batch = {"image": images, "label": labels, "mask": np.ones(BATCH_SIZE, bool)}
            state, metrics = step(state, batch, jnp.ones(()))
            losses.append(float(metrics["loss"]))
            their_losses.append(float(their_loss))
        difference, path = largest_difference(state.variables, variables_of(model, backbone))
        moved, _ = largest_difference(state.variables, initial)
    print(f"after {NUM_STEPS} steps: largest relative difference {difference:.1e} at {path}")
    np.testing.assert_allclose(losses, their_losses, rtol=TOLERANCE)
    assert moved > 0.01
    assert difference < TOLERANCE
