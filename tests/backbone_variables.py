"""Variables of a backbone without compiling its initialisers, for tests."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from quick import jit


def constant_variables(module):
    """Variables that average: every kernel constant, biases 0, batch norm the identity."""
    return _fill(module, lambda shape: np.full(shape, 1 / math.prod(shape[:-1])))


def random_variables(module, seed=0):
    """Kernels drawn normally with variance 2 / fan_in, biases 0, batch norm the identity."""
    rng = np.random.default_rng(seed)
    return _fill(module, lambda shape: rng.normal(0, math.sqrt(2 / math.prod(shape[:-1])), shape))


def _fill(module, draw_kernel):
    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return draw_kernel(leaf.shape).astype(np.float32)
        return np.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0, np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def check_dilated(whole, stride: int, height: int, width: int) -> None:
    """Assert in float64 that every k-th cell of the dilated network is the whole one's, k = 32 / stride."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        variables = jax.tree_util.tree_map_with_path(
            lambda path, a: a + (path[-1].key != "kernel") * rng.uniform(-0.3, 0.3, a.shape), random_variables(whole)
        )
        images = rng.uniform(size=(2, height, width, 3))
        whole = whole.clone(dtype=jnp.float64)
        dilated = whole.clone(stride=stride, stride_by="dilate")
        expected, features = (np.asarray(jit(net.apply)(variables, images)) for net in (whole, dilated))
    k = 32 // stride
    np.testing.assert_allclose(features[:, ::k, ::k], expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    assert expected.std() > 1e-3 * np.abs(expected).max()


def check_options(module, size: int) -> None:
    """Assert that remat changes nothing and bfloat16 little: 5 % of the largest feature."""
    images = jax.random.uniform(jax.random.key(1), (2, size, size, 3))
    variables = random_variables(module)
    features = jax.jit(module.apply)(variables, images)
    remat = jax.jit(module.clone(remat=True).apply)(variables, images)
    np.testing.assert_allclose(remat, features, rtol=1e-5, atol=1e-6)
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, images)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - features).max() < 0.05 * np.abs(features).max()
