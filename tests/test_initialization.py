"""Initialising on the host gives the numbers of the compiled initialisation, bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import slow
from scipy.stats import kstest

from cxa_jax import run as run_module
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.initialization import (
    CHUNK,
    draw_glorot_uniform,
    find_needed,
    glorot_uniform,
    make_he_normal,
    run_on_host,
    runs_on_host,
)
from cxa_jax.models.resnet import ResNet
from cxa_jax.optimizer import create_optimizer
from cxa_jax.train_state import create_train_state, init_train_state, trace_initialization


@pytest.mark.parametrize(
    "shape", [(3, 5), (1, 1), (1, 1, 64, 128), (3, 3, 128, 32), (7, 7, 3, 64), (2, CHUNK), (513, 257)]
)
def test_draws_are_those_of_flax(shape):
    key = jax.random.fold_in(jax.random.key(np.random.default_rng().integers(2**31)), 3)
    expected = jax.nn.initializers.glorot_uniform()(key, shape)
    np.testing.assert_array_equal(draw_glorot_uniform(key, shape), expected)
    np.testing.assert_array_equal(glorot_uniform(key, shape), expected)


def create(pooling="amm", **options):
    return CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling, **options)


@pytest.mark.parametrize("model", [create(), create("gated"), create(num_labels=14), create("gap", head="linear")])
@pytest.mark.parametrize("seed", [0, slow(7)])
def test_state_is_that_of_the_compiled_initialization(model, seed):
    key, tx = jax.random.key(seed), create_optimizer(0.1, 0.9)
    expected = jax.jit(lambda key: init_train_state(key, model, tx, tiny.SIZE))(key)
    state = create_train_state(key, model, tx, tiny.SIZE)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "backbone",
    [
        DenseNet((1, 1), remat=True),
        DenseNet((1, 1), implementation="fused", remat=True),
        ResNet((1, 1), implementation="fused", remat=True),
        slow(InceptionResNetV2((1, 1, 1), remat=True)),
    ],
)
def test_recomputing_graphs_start_from_the_same_state(backbone):
    key, tx, model = jax.random.key(3), create_optimizer(0.1, 0.9), CardioXAttentionNet(backbone)
    traced = trace_initialization(key, model, tx, 96)
    assert runs_on_host(traced.function, key)
    plain = CardioXAttentionNet(backbone.clone(remat=False, implementation="plain"))
    expected = jax.jit(lambda key: init_train_state(key, plain, tx, 96))(key)
    jax.tree.map(np.testing.assert_array_equal, traced.run(key), expected)


def test_a_module_that_draws_otherwise_is_compiled():
    class Normal(nn.Module):
        num_features = 8

        @nn.compact
        def __call__(self, images, *, train):
            return nn.Conv(8, (3, 3), (4, 4), kernel_init=nn.initializers.lecun_normal())(images)

    key, tx, model = jax.random.key(3), create_optimizer(0.1, 0.9), CardioXAttentionNet(Normal())
    traced = trace_initialization(key, model, tx, 32)
    assert not runs_on_host(traced.function, key)
    expected = jax.jit(lambda key: init_train_state(key, model, tx, 32))(key)
    jax.tree.map(np.testing.assert_array_equal, traced.run(key), expected)


@pytest.mark.parametrize("option", ["rbg", "not partitionable"])
def test_other_generators_are_left_to_jax(option):
    """Where jax draws in another way, its own program does."""
    model, tx = create(), create_optimizer(0.1, 0.9)
    key = jax.random.key(1, impl="rbg" if option == "rbg" else None)
    with jax.threefry_partitionable(option == "rbg"):
        expected = jax.jit(lambda key: init_train_state(key, model, tx, tiny.SIZE))(key)
        state = create_train_state(key, model, tx, tiny.SIZE)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_shapes_are_those_of_the_state():
    key, model, tx = jax.random.key(0), create(), create_optimizer(0.1, 0.9)
    traced = trace_initialization(key, model, tx, tiny.SIZE)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.run(key))
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.shapes)


def test_only_what_is_needed_is_evaluated():
    def function(x):
        unused = jnp.sin(x) @ jnp.ones((2, 2))
        return jnp.cos(x), jnp.zeros((2, 3)), x, 4.0 * unused.shape[0]

    traced = jax.make_jaxpr(function)(jnp.ones(2))
    names = [equation.primitive.name for equation in find_needed(traced.jaxpr)]
    assert sorted(names) == ["broadcast_in_dim", "cos"]
    cos, zeros, x, four = run_on_host(traced, jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(cos, np.cos([0.5, 1.0]), rtol=1e-6)
    assert type(zeros) is np.ndarray and zeros.shape == (2, 3) and zeros.dtype == np.float32
    assert x.tolist() == [0.5, 1.0] and float(four) == 8


@pytest.mark.parametrize("shape", [(7, 7, 3, 64), (1, 1, 256, 128), (3, 3, 128, 32)])
def test_he_normal_has_the_variance_of_pytorch_and_the_order_of_the_draws(shape):
    uniform = draw_glorot_uniform(jax.random.key(np.random.default_rng().integers(2**31)), shape)
    kernel = make_he_normal(uniform)
    assert kernel.dtype == np.float32 and kernel.shape == shape
    standard = np.sort(kernel.ravel().astype(np.float64)) / np.sqrt(2 / np.prod(shape[:3]))  # kaiming_normal_: fan in
    assert kstest(standard, "norm").pvalue > 1e-6
    np.testing.assert_array_equal(np.argsort(kernel.ravel()), np.argsort(uniform.ravel()))
    least = np.array(-np.sqrt(6 / (np.prod(shape[:3]) + np.prod(shape[:2]) * shape[3])), np.float32)
    assert np.isfinite(make_he_normal(np.full(shape, least))).all()


def test_a_run_draws_what_its_config_says(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    states = {
        name: run_module.create_run(tiny.make_config(**{"model.kernel_init": name})).create_state()
        for name in ("glorot_uniform", "he_normal")
    }
    he, glorot = (jax.device_get(states[name].params) for name in ("he_normal", "glorot_uniform"))
    for path, leaf in jax.tree_util.tree_flatten_with_path(he)[0]:
        before = glorot
        for key in path:
            before = before[key.key]
        if path[0].key == "backbone" and leaf.ndim == 4:
            np.testing.assert_array_equal(leaf, make_he_normal(before))
        else:
            np.testing.assert_array_equal(leaf, before)
