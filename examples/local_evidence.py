"""Does the attention find the object? It does if cells hold local evidence: python examples/local_evidence.py

A toy of the paper's head: the real attention branch and GWAP with one dense unit, on grids of 8 x 8 cells drawn at
random instead of a backbone's features. Every grid has an object of 4 x 4 cells somewhere, plain to see in one channel.
Positives have evidence in another: in the cells that can see the object, which are its own, or also those up to some
cells beside it, as receptive fields grow, or all of them. Printed is how far W lies on the object: its energy ratio,
the object's share of W over its share of the cells. 1 is chance, 4 is perfect. It takes a minute of one core.
"""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cxa_jax.localization import compute_energy_ratio
from cxa_jax.models.amm import AttentionMappingMechanism
from cxa_jax.pooling import gwap

SIDE, OBJECT, CHANNELS = 8, 4, 16  # cells, cells, features of a cell
RADII = {"the object's cells alone": 0, "1 cell beside it": 1, "2 cells": 2, "3 cells": 3, "every cell": SIDE}
NUM_STEPS, BATCH, NUM_TEST = 300, 32, 512
RATES, SEEDS = (0.01, 0.1), (0, 1, 2)


class Toy(nn.Module):
    """Attention branch, globally weighted average, one dense unit: features [B, h, w, C] -> logit [B], z."""

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        normalized, attention_logits = AttentionMappingMechanism()(features, train=train)
        return nn.Dense(1)(gwap(normalized, attention_logits))[:, 0], attention_logits


def draw_grids(rng: np.random.Generator, number: int, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw features [N, 8, 8, C], labels [N] and the object's cells, bool [N, 8, 8]; noise has an sd of 1."""
    labels = rng.integers(0, 2, number)
    corners = rng.integers(0, SIDE - OBJECT + 1, (number, 2))
    inside = (np.arange(SIDE) >= corners[..., None]) & (np.arange(SIDE) < corners[..., None] + OBJECT)
    objects = inside[:, 0, :, None] & inside[:, 1, None, :]
    seeing = ndimage.maximum_filter(objects, (1, 2 * radius + 1, 2 * radius + 1))
    features = rng.standard_normal((number, SIDE, SIDE, CHANNELS), np.float32)
    features[..., 0] += 2 * objects  # the object itself, whatever the label
    features[..., 1] += seeing * labels[:, None, None]  # the evidence
    return features, labels, objects


def train(radius: int, rate: float, seed: int, num_steps: int = NUM_STEPS) -> tuple[float, float]:
    """Train the toy by SGD with momentum; return its accuracy and W's mean energy ratio on fresh positives."""
    rng = np.random.default_rng(seed)
    params, batch_stats, opt_state = initialize(jax.random.key(seed))
    for _ in range(num_steps):
        features, labels, _ = draw_grids(rng, BATCH, radius)
        params, batch_stats, opt_state = update(params, batch_stats, opt_state, features, labels, rate)
    features, labels, objects = draw_grids(rng, NUM_TEST, radius)
    logits, attention = predict(params, batch_stats, features)
    attention = np.asarray(attention)
    ratios = [
        compute_energy_ratio(w, mask) for w, mask in zip(attention[labels == 1], objects[labels == 1], strict=True)
    ]
    return float(np.mean((logits > 0) == labels)), float(np.mean(ratios))


@jax.jit
def initialize(key):
    """Return parameters, batch-norm moments and the optimiser's state."""
    variables = Toy().init(key, jnp.zeros((1, SIDE, SIDE, CHANNELS)), train=False)
    return variables["params"], variables["batch_stats"], optax.sgd(0.0, momentum=0.9).init(variables["params"])


@jax.jit
def predict(params, batch_stats, features):
    """Return logits [B] and W [B, h, w]."""
    logits, z = Toy().apply({"params": params, "batch_stats": batch_stats}, features, train=False)
    return logits, jax.nn.sigmoid(z[..., 0])


@jax.jit
def update(params, batch_stats, opt_state, features, labels, rate):
    """Take one step of SGD with momentum .9 on the mean binary cross-entropy."""

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), new = Toy().apply(variables, features, train=True, mutable=["batch_stats"])
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean(), new["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optax.sgd(rate, momentum=0.9).update(gradients, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state


def main() -> None:
    """Print a row for each radius: energy ratio and accuracy, the range over rates and seeds."""
    print(f"{'evidence lies in':<26}{'energy ratio of W':>20}{'accuracy':>16}")
    for name, radius in RADII.items():
        accuracies, ratios = zip(*(train(radius, rate, seed) for rate in RATES for seed in SEEDS), strict=True)
        ranges = (f"{min(values):.2f} - {max(values):.2f}" for values in (ratios, accuracies))
        print("{:<26}{:>20}{:>16}".format(name, *ranges), flush=True)


if __name__ == "__main__":
    main()
