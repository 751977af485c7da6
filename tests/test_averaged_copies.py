"""Copies of an image, their maps carried back: against a loop over cells, and a network that moves as images do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_run
import tiny
from quick import jit

from cxa_jax.averaged_copies import LIST, MAX_COPIES, Copy, average_copies, choose_copies
from cxa_jax.data.augment import compose_affine, normalize_images, to_rgb, warp
from cxa_jax.errors import UserError
from cxa_jax.export import export_network
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.optimizer import create_optimizer
from cxa_jax.steps import make_eval_step
from cxa_jax.train_state import create_train_state
from cxa_jax.trained_network import load_trained_network

STRIDE, OFFSET = 8, 2


def read_cells(images):
    """Return the grey levels at the centres of the cells: the least network that moves as its image does."""
    return {"map": images[:, OFFSET::STRIDE, OFFSET::STRIDE, 0], "logit": jnp.mean(images, axis=(1, 2, 3))}


def average(look, images, copies):
    return jit(lambda images: average_copies(look, images, copies, STRIDE, OFFSET))(images)


def average_by_loop(maps, copies, image_size):
    """Average maps [K, B, h, w] cell by cell, in float64, as the docstring says it."""
    _, num_images, *grid = maps.shape
    result = np.zeros((num_images, *grid))
    centers = [OFFSET + STRIDE * np.arange(cells) for cells in grid]
    for row in range(grid[0]):
        for column in range(grid[1]):
            values = []
            for seen, copy in zip(maps, copies, strict=True):
                readings, shares = [np.zeros(num_images)], []
                for axis, cell in enumerate((row, column)):
                    centre = (image_size[axis] - 1) / 2
                    pixel = centre + (centers[axis][cell] - centre - copy.shift[axis]) / copy.zoom
                    near = 1 - np.abs((pixel - centers[axis]) / STRIDE)  # of each cell of the copy, linear
                    shares.append(np.where(near > 1e-9, near, 0))
                    looked_at = centre + copy.zoom * (centers[axis] - centre) + copy.shift[axis]
                    outside = (looked_at < -0.5) | (looked_at > image_size[axis] - 0.5)
                    if shares[-1].sum() < 1 - 1e-9 or (outside & (shares[-1] > 0)).any():
                        readings = None
                if readings is not None:
                    values.append(np.einsum("bpq,p,q->b", seen, *shares))
            result[:, row, column] = np.mean(values, axis=0)
    return result


@pytest.mark.parametrize("image_size", [(64, 64), (40, 72)])
def test_average_is_that_of_a_loop_over_cells(image_size):
    rng = np.random.default_rng(0)
    images = rng.random((2, *image_size, 1)).astype(np.float32)
    grid = [len(range(OFFSET, side, STRIDE)) for side in image_size]
    kernel = rng.normal(size=(np.prod(image_size), np.prod(grid))).astype(np.float32) / 30

    def look(images):  # no cell has to do with its place
        cells = jnp.tanh(jnp.matmul(images.reshape(len(images), -1), kernel, precision="highest"))
        return {"map": cells.reshape(-1, *grid), "logit": cells[:, 0]}

    copies = [*choose_copies(MAX_COPIES, STRIDE, image_size), Copy((-5.0, 2.5), 1.2), Copy((9.0, -3.0), 0.8)]
    found = average(look, images, copies)
    each = [look(jnp.stack([warp(image, jnp.asarray(c.compose(image_size), jnp.float32)) for image in images]))
            for c in copies]  # fmt: skip
    maps = np.array([seen["map"] for seen in each], np.float64)
    np.testing.assert_allclose(found["map"], average_by_loop(maps, copies, image_size), atol=2e-5)
    np.testing.assert_allclose(found["logit"], np.mean([seen["logit"] for seen in each], axis=0), atol=2e-5)
    assert np.abs(found["map"] - maps[0]).max() > 0.1


@pytest.mark.parametrize("num_copies", range(2, MAX_COPIES + 1))
def test_a_ramp_stays_where_it_is(num_copies):
    """Linear interpolation is exact on it, so nothing but the place of a cell and what is filled can alter it."""
    rows, columns = np.mgrid[:64, :64].astype(np.float32)
    images = np.stack([0.2 + 0.01 * rows, 0.9 - 0.004 * rows - 0.008 * columns])[..., None]
    copies = choose_copies(num_copies, STRIDE, (64, 64))
    np.testing.assert_allclose(average(read_cells, images, copies)["map"], read_cells(images)["map"], atol=1e-5)


def test_smooth_images_stay_where_they_are_to_interpolation_error():
    rows, columns = np.mgrid[:64, :64] / 64
    image = 0.5 + 0.4 * np.sin(4 * rows + 1) * np.cos(3 * columns)
    images = image[None, ..., None].astype(np.float32)
    found = average(read_cells, images, choose_copies(MAX_COPIES, STRIDE, (64, 64)))["map"]
    # of a linear interpolation, h^2 / 8 of the second derivatives, both axes
    bound = (STRIDE / 64) ** 2 / 8 * 0.4 * (4**2 + 3**2)
    np.testing.assert_allclose(found, read_cells(images)["map"], atol=bound)


def test_shifts_by_whole_cells_are_exact():
    images = np.random.default_rng(1).random((3, 64, 64, 1)).astype(np.float32)
    copies = [Copy((0, 0), 1.0), Copy((STRIDE, 0), 1.0), Copy((-2 * STRIDE, STRIDE), 1.0), Copy((0, -STRIDE), 1.0)]
    np.testing.assert_allclose(average(read_cells, images, copies)["map"], read_cells(images)["map"], rtol=1e-6)


def test_filled_pixels_have_no_say():
    """A network that shouts where it sees fill: the grey of the outermost pixels, on which no cell is centred."""
    images = np.full((1, 64, 64, 1), 0.75, np.float32)
    images[:, 1:-1, 1:-1] = 0.25

    def shout(images):
        cells = read_cells(images)["map"]
        return {"map": jnp.where(cells > 0.5, 1e6, cells)}

    copies = [Copy((0, 0), 1.0), Copy((-20, 0), 1.0), Copy((0, -4), 1.0), Copy((0, 0), 1.3)]
    np.testing.assert_allclose(average(shout, images, copies)["map"], 0.25, rtol=1e-6)
    for copy in copies[1:]:
        assert shout(warp(images[0], jnp.asarray(copy.compose((64, 64)), jnp.float32))[None])["map"].max() == 1e6


def test_copies_are_those_of_the_affine_map_of_training():
    rng = np.random.default_rng(2)
    for _ in range(5):
        copy, size = Copy(tuple(rng.normal(0, 9, 2)), rng.uniform(0.7, 1.4)), tuple(rng.integers(20, 90, 2).tolist())
        expected = compose_affine(rotation=jnp.zeros(()), shift=jnp.array(copy.shift), shear=jnp.zeros(()),
                                  zoom=jnp.full(2, copy.zoom), flip=jnp.array(False), size=size)  # fmt: skip
        np.testing.assert_allclose(copy.compose(size), expected, rtol=1e-5, atol=1e-4)


def test_the_list():
    copies = choose_copies(MAX_COPIES, STRIDE, (64, 96))
    assert copies[0] == Copy((0, 0), 1.0) and len(set(copies)) == len(LIST)
    for number in range(1, MAX_COPIES + 1):
        assert choose_copies(number, STRIDE, (64, 96)) == copies[:number]
        if number % 2:
            assert np.sum([copy.shift for copy in copies[:number]], axis=0).tolist() == [0, 0]
            assert np.mean([copy.zoom for copy in copies[:number]]) == pytest.approx(1)
    assert copies[1].shift == (STRIDE / 2, STRIDE / 2)
    assert choose_copies(2, 32, (64, 96))[1].shift == (4, 4)  # half a cell would be a quarter of the side
    assert choose_copies(2, 1, (8, 8))[1].shift == (1, 1)
    for number in (0, MAX_COPIES + 1):
        with pytest.raises(UserError, match=f"config.eval.num_copies={number} must be from 1"):
            choose_copies(number, STRIDE, (64, 64))


def test_logits_of_a_network_are_the_mean_over_its_copies():
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"]())
    state = create_train_state(jax.random.key(1), model, create_optimizer(0.1, 0.9), tiny.SIZE)
    images = np.random.default_rng(3).integers(0, 256, (4, tiny.SIZE, tiny.SIZE, 1)).astype(np.uint8)
    found = jit(make_eval_step(model, "min_max", 3))(state.variables, images)
    grey = normalize_images(images, "min_max")
    matrices = [
        jnp.asarray(copy.compose((tiny.SIZE, tiny.SIZE)), jnp.float32)
        for copy in choose_copies(3, model.backbone.stride, (tiny.SIZE, tiny.SIZE))
    ]
    apply = jit(lambda grey: model.apply(state.variables, to_rgb(grey, "min_max"), train=False)[0])
    each = [apply(jax.vmap(warp, (0, None))(grey, matrix)) for matrix in matrices]
    np.testing.assert_allclose(found["logit"], np.mean(each, axis=0), rtol=1e-4, atol=1e-5)
    assert found["attention"].shape == found["evidence"].shape == (4, 2, 2)
    alone = str(jax.make_jaxpr(make_eval_step(model, "min_max"))(state.variables, images))
    averaged = str(jax.make_jaxpr(make_eval_step(model, "min_max", 3))(state.variables, images))
    assert "scan[" in averaged and "scan[" not in alone  # one image, one look: the graph of no copies at all


def test_a_tested_run_is_used_as_it_was_tested(tmp_path):
    run, variables = saved_run.save_run(tmp_path, **{"eval.num_copies": 3})
    assert run.test_step is not run.eval_step
    images = np.stack([record["image"] for record in run.dataset.splits["test"].source[:8]])
    expected = run.test_step(variables, images)
    network = load_trained_network(str(tmp_path))
    found = network.eval_step(network.variables, images)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert np.abs(run.eval_step(variables, images)["logit"] - expected["logit"]).max() > 1e-4


@pytest.mark.slow
def test_an_exported_network_averages_too(tmp_path):
    run, variables = saved_run.save_run(tmp_path, **{"eval.num_copies": 3})
    images = np.stack([record["image"] for record in run.dataset.splits["test"].source[:8]])
    expected = run.test_step(variables, images)
    exported = export_network(load_trained_network(str(tmp_path), implementation="plain"))
    found = exported.call(uint8=images[:5, ..., 0], float32=images[5:, ..., 0].astype(np.float32))
    for name in ("logit", "attention"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_one_copy_compiles_once(tmp_path):
    run, _ = saved_run.save_run(tmp_path)
    assert run.test_step is run.eval_step
