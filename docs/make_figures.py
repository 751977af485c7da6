"""Draw the figures of amm.md: python docs/make_figures.py [folder]."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cxa_jax.pooling import POOLINGS, amm_weights, average_pool_2x2_same, softmax_weights

NUM_CELLS = 31


def make_row():
    """Return one row of cells: a feature that rises over a 'heart', and logits that find it, [1, 1, S, 1] each."""
    x = np.linspace(-3, 3, NUM_CELLS)
    feature = np.exp(-((x - 0.4) ** 2)) + 0.3 * np.sin(2.5 * x) ** 2
    logits = 5 * np.exp(-((x - 0.6) ** 2)) - 3
    return jnp.asarray(feature, jnp.float32)[None, None, :, None], jnp.asarray(logits, jnp.float32)[None, None, :, None]


def draw_weights(axes):
    """Draw p over the cells as the logits shift: from GAP to softmax attention."""
    _, logits = make_row()
    for shift, colour in ((6, "C0"), (2, "C1"), (0, "C2"), (-6, "C3")):
        axes.plot(amm_weights(logits + shift)[0, 0, :, 0], color=colour, label=f"AMM, z {shift:+d}")
    axes.plot(softmax_weights(logits)[0, 0, :, 0], "k:", label="softmax attention")
    axes.axhline(1 / NUM_CELLS, color="0.6", linestyle="--", label="GAP, 1/S")
    axes.set(xlabel="cell", ylabel="p", title="Weights of one row of cells")
    axes.legend(fontsize=7)


def draw_shift(axes):
    """Draw the pooled feature against the shift b of the logits."""
    features, logits = make_row()
    shifts = jnp.linspace(-10, 10, 81)
    pooled = jax.vmap(lambda shift: POOLINGS["amm"](features, logits + shift)[0][0, 0])(shifts)
    axes.plot(shifts, pooled, label="AMM")
    axes.axhline(POOLINGS["gap"](features, None)[0][0, 0], color="0.6", linestyle="--", label="GAP")
    axes.axhline(POOLINGS["softmax"](features, logits)[0][0, 0], color="k", linestyle=":", label="softmax attention")
    axes.set(xlabel="b, added to all logits", ylabel="f", title="AMM between its two limits")
    axes.legend(fontsize=7)


def draw_temperature(axes):
    """Draw the pooled feature of each pooling against its temperature: from the mean to one cell."""
    features, logits = make_row()
    temperatures = jnp.logspace(-2, 2, 81)
    for name in ("amm", "softmax", "lse", "gem"):
        call = POOLINGS[name]
        pooled = jax.vmap(lambda t, call=call: call(features, logits, temperature=t)[0][0, 0])(temperatures)
        axes.semilogx(temperatures, pooled, label=name)
    for name, style in (("gap", "--"), ("topk", "-."), ("gmp", ":")):
        axes.axhline(POOLINGS[name](features, None)[0][0, 0], color="0.6", linestyle=style, label=name)
    axes.set(xlabel="temperature", ylabel="f", title="Sharp to flat")
    axes.legend(fontsize=7, ncol=2)


def make_family_figure(path):
    """Write family.png: the weights, the shift of the logits, the temperature."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for draw, panel in zip((draw_weights, draw_shift, draw_temperature), axes, strict=True):
        draw(panel)
    save(figure, path)


def make_half_cell_figure(path):
    """Write half_cell.png: one bright cell before and after the 2x2 'same' average pool."""
    before = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3].set(1.0)
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 2.8), layout="constrained")
    for panel, image, title in zip(axes, (before, average_pool_2x2_same(before)), ("z", "pooled 2x2"), strict=True):
        panel.imshow(image[0, :, :, 0], vmin=0, vmax=1, cmap="magma")
        rows, columns = np.mgrid[:7, :7]
        centre = [float(np.sum(np.asarray(image)[0, :, :, 0] * grid)) for grid in (columns, rows)]
        panel.plot(*centre, "c+", markersize=14)
        panel.set(title=f"{title}: centre ({centre[1]:g}, {centre[0]:g})", xticks=range(7), yticks=range(7))
    save(figure, path)


def save(figure, path):
    """Write the figure without the software's version, so that the same picture has the same bytes."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(folder):
    """Write every figure into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_family_figure(folder / "family.png")
    make_half_cell_figure(folder / "half_cell.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "figures")
