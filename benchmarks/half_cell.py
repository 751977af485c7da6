"""Where a map's cell looks: does upsampling have to undo the half cell of the attention's 2x2 average pool?

    python benchmarks/half_cell.py --workdir=runs/dense121-phantom_hour

Measured on phantoms alone, in two ways:

1. The pixels that a cell depends on: the centre of its squared input gradient, less the centre of the cell's receptive
   field. Each phantom is taken in all four flips, so that what it shows favours no side.
2. What a cell can say: the attention branch of Table 3 is fitted to the share of heart in the square of 32 px at the
   cell's place, shifted by 0 to 32 px, on the frozen features of the run; and so is the same branch without the pool.
   The shift of the least error on other patients is where the cell looks.

Writes benchmarks/results/half_cell.json and .md.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path("~/.cache/cxa_jax/xla").expanduser()))

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402 (it reads the variable when it is imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from cxa_jax.array_types import PyTree  # noqa: E402
from cxa_jax.data.augment import normalize_images, to_rgb  # noqa: E402
from cxa_jax.data.phantom import PhantomSpec  # noqa: E402
from cxa_jax.data.phantom_render import Drawing, draw  # noqa: E402
from cxa_jax.evidence import linearized_evidence  # noqa: E402
from cxa_jax.models.amm import WIDTHS  # noqa: E402
from cxa_jax.pooling import average_pool_2x2_same  # noqa: E402
from cxa_jax.statistics import bootstrap_means  # noqa: E402
from cxa_jax.timing import describe_host  # noqa: E402
from cxa_jax.trained_network import TrainedNetwork, load_trained_network  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

MAPS = {
    "features": "features F, a random direction of channels: no pool",
    "attention": "attention logit z: behind the pool",
    "evidence": "class evidence p <g, F>",
}
BRANCHES = {"with the 2x2 pool": True, "without it": False}
FIRST_PATIENT = 1_000_000  # beyond those of any training set
SHIFTS_PX = (0, 8, 16, 24, 32)
NUM_FIT_STEPS, FIT_RATE = 400, 3e-3

Maps = Callable[..., dict[str, jax.Array]]


class Branch(nn.Module):
    """Table 3's attention branch on standardised features, with or without its pool: [B, h, w, C] -> [B, h, w]."""

    pool: bool

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = features
        for width in WIDTHS:
            x = nn.elu(nn.Dense(width)(x))
        x = average_pool_2x2_same(x) if self.pool else x
        return nn.Dense(1)(x)[..., 0]


def make_maps(network: TrainedNetwork) -> Maps:
    """Return a function of the variables and float images [1, S, S, 3] to the maps {name: [h, w]}."""

    def maps(variables: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        _, out = network.model.apply(variables, images, train=False)
        head = lambda pooled: network.model.apply(variables, pooled, method="classify")  # noqa: E731
        direction = jax.random.normal(jax.random.key(0), (out["features"].shape[-1],))
        frozen = jax.lax.stop_gradient(out["pooled"])
        return {
            "features": (out["features"] @ direction)[0],
            "attention": out["attention_logits"][0, ..., 0],
            "evidence": linearized_evidence(head, out["features"], out["weights"], frozen)[0],
        }

    return maps


def make_pull(maps: Maps) -> Maps:
    """Return a function of (variables, images, row, column) to each map's squared image gradient at a cell, [S, S]."""

    @jax.jit
    def pull(variables: PyTree, images: jax.Array, row: int, column: int) -> dict[str, jax.Array]:
        def one(name: str) -> jax.Array:
            return jnp.sum(jax.grad(lambda x: maps(variables, x)[name][row, column])(images)[0] ** 2, axis=-1)

        return {name: one(name) for name in MAPS}

    return pull


def to_images(network: TrainedNetwork, pixels: np.ndarray) -> jax.Array:
    """Return what the network reads of bytes [N, S, S]."""
    return to_rgb(normalize_images(jnp.asarray(pixels[..., None]), network.normalization), network.normalization)


def measure_places(network: TrainedNetwork, variables: PyTree, drawings: list[Drawing]) -> dict[str, Any]:
    """Return for each map where its middle cell looks, x and y, less offset + stride * cell: mean, low, high, px."""
    pull, stride, offset = make_pull(make_maps(network)), network.model.backbone.stride, network.model.backbone.offset
    found = {name: [] for name in MAPS}
    for drawing in drawings:
        size = len(drawing.image)
        cell, pixels = (size // stride) // 2, np.arange(size)
        places = {name: [] for name in MAPS}
        for flip in np.ndindex(2, 2):
            image = drawing.image[tuple(slice(None, None, 1 - 2 * turned) for turned in flip)]
            for name, energy in pull(variables, to_images(network, image[None]), cell, cell).items():
                energy = np.asarray(energy, np.float64)
                places[name].append([energy.sum(axis) @ pixels / energy.sum() for axis in (0, 1)])
        for name, values in places.items():
            found[name].append(np.mean(values, axis=0) - offset - stride * cell)
    results = {}
    for name, values in found.items():
        results[name] = {axis: bootstrap_mean(column) for axis, column in zip("xy", np.array(values).T, strict=True)}
    return results


def measure_fit(network: TrainedNetwork, drawings: list[Drawing]) -> dict[str, Any]:
    """Return the error of fitted branches at each shift on the second half of the phantoms, relative to no map."""
    stride, offset = network.model.backbone.stride, network.model.backbone.offset
    extract = jax.jit(lambda variables, images: network.model.apply(variables, images, train=False)[1]["features"])
    features = np.concatenate(
        [np.asarray(extract(network.variables, to_images(network, one.image[None]))) for one in drawings]
    )
    half = len(drawings) // 2
    mean, sd = features[:half].mean((0, 1, 2)), features[:half].std((0, 1, 2)) + 1e-6
    features = (features - mean) / sd
    results = {}
    for title, pool in BRANCHES.items():
        rows, errors = {}, {}
        for shift in SHIFTS_PX:
            truth, inside = cover_cells(drawings, features.shape[1:3], stride, offset + shift)
            values = fit_branch(Branch(pool), features[:half], truth[:half], inside, features[half:])
            error = ((values - truth[half:]) ** 2)[:, inside].mean(1)
            blind = ((truth[:half].mean(0) - truth[half:]) ** 2)[:, inside].mean(1)  # knows the place, sees no image
            errors[shift] = error / blind.mean()
            rows[f"{shift} px"] = bootstrap_mean(errors[shift])
        rows["16 px less 0 px, paired"] = bootstrap_mean(errors[16] - errors[0])
        results[title] = rows
    return results


def bootstrap_mean(values: np.ndarray) -> list[float]:
    """Return mean, low and high over patients, of whom each has one value."""
    found = bootstrap_means({"mean": values}, None)["mean"]
    return [found.estimate, found.low, found.high]


def cover_cells(
    drawings: list[Drawing], map_size: tuple[int, int], stride: int, offset: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of heart in each cell's square [N, h, w], and which squares lie in the image at every shift."""
    size = len(drawings[0].image)
    edges = [offset - stride // 2 + stride * np.arange(count) for count in map_size]
    fits = [(e - max(SHIFTS_PX) >= 0) & (e + stride + max(SHIFTS_PX) <= size) for e in edges]
    masks = np.stack([one.heart_mask for one in drawings]).astype(np.float64)
    table = np.zeros((len(masks), size + 1, size + 1))
    table[:, 1:, 1:] = masks.cumsum(1).cumsum(2)
    top, left = (np.clip(e, 0, size) for e in edges)
    bottom, right = (np.clip(e + stride, 0, size) for e in edges)
    at = lambda rows, columns: table[:, rows[:, None], columns[None]]  # noqa: E731
    share = (at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)) / stride**2
    return share, fits[0][:, None] & fits[1][None]


def fit_branch(
    branch: Branch, features: np.ndarray, truth: np.ndarray, inside: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Fit by cross-entropy, and return W of the `others`."""
    params, tx = branch.init(jax.random.key(0), features[:1]), optax.adam(FIT_RATE)
    features, truth, inside = jnp.asarray(features), jnp.asarray(truth, jnp.float32), jnp.asarray(inside)

    @jax.jit
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        def loss(params: PyTree) -> jax.Array:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(branch.apply(params, features), truth), where=inside)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(NUM_FIT_STEPS):
        params, state = step(params, state)
    return np.asarray(nn.sigmoid(branch.apply(params, others)), np.float64)


def format_results(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Does a map have to be shifted by the half cell of the 2x2 average pool?",
        "",
        f"Phantoms of {results['size']} px, one a patient; network {results['network']}. Centre of the pixels that the "
        f"middle cell depends on, less {results['offset']} + {results['stride']} cell, px: mean over "
        f"{results['num_patients']} phantoms in four flips each [95 %].",
        "",
        "| map | initialised weights: x | y | trained weights: x | y |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, title in MAPS.items():
        rows = [results["places"][weights][name] for weights in ("initialised", "trained")]
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*row[axis]) for row in rows for axis in ("x", "y")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Squared error of a fitted branch's W against the share of heart at the cell, shifted right and down, on "
        f"{results['num_tested']} other patients, over that of the mean heart [95 %]:",
        "",
        "| branch | " + " | ".join(next(iter(results["fit"].values()))) + " |",
        "|---|" + "--:|" * (len(SHIFTS_PX) + 1),
    ]
    for title, rows in results["fit"].items():
        lines.append(
            f"| {title} | " + " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row) for row in rows.values()) + " |"
        )
    environment = results["environment"]
    lines += [
        "",
        f"Machine: {results['host']['processor']}. Commit {environment['commit']}, {environment['time']}.",
        f"Command: `python {environment['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run with attention, trained on phantoms")
    parser.add_argument("--image_size", type=int, default=352, help="px: 11 x 11 cells")
    parser.add_argument("--num_patients", type=int, default=16, help="for the gradients")
    parser.add_argument("--num_fitted", type=int, default=160, help="patients to fit to, and as many to test on")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    network = load_trained_network(options.workdir)
    fields = network.config.data.phantom
    spec = PhantomSpec(fields.preset, fields.prevalence, fields.label_noise, fields.seed)
    drawings = [draw(spec, options.image_size, (FIRST_PATIENT + n, 0)) for n in range(2 * options.num_fitted)]
    empty = jnp.zeros((1, options.image_size, options.image_size, 3))
    fresh = dict(network.model.init(jax.random.key(1), empty, train=False))
    weights = {"initialised": fresh, "trained": network.variables}
    few = drawings[: options.num_patients]
    results = {
        "places": {name: measure_places(network, variables, few) for name, variables in weights.items()},
        "fit": measure_fit(network, drawings),
        "stride": network.model.backbone.stride,
        "offset": network.model.backbone.offset,
        "size": options.image_size,
        "num_patients": options.num_patients,
        "num_tested": options.num_fitted,
        "network": network.source.name,
        "host": describe_host(),
        "environment": describe_environment(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "half_cell.json", to_json(results))
    text = format_results(results)
    write_atomically(options.output / "half_cell.md", text)
    print(text)


if __name__ == "__main__":
    main()
