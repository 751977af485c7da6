"""Two graphs of one function: everything that can be asked of them, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
from quick import initialize, jit

from cxa_jax.models.fused_layer_groups import LayerParams
from cxa_jax.models.fused_norms import Affine


def random_array(*shape, seed=0):
    """Numbers around a half, of both signs."""
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1.5, shape))


def random_dense_layers(normal, num_layers, channels, growth, bottleneck=5):
    """Parameters of a dense block's layers; `normal(*shape)` draws each array."""
    return tuple(
        LayerParams(
            Affine(normal(c), normal(c)),
            normal(1, 1, c, bottleneck),
            Affine(normal(bottleneck), normal(bottleneck)),
            normal(3, 3, bottleneck, growth),
        )
        for c in range(channels, channels + num_layers * growth, growth)
    )


def perturbed_variables(net, images, dtype):
    """Variables far from their initial values, variances positive."""
    rng = np.random.default_rng(0)
    variables = initialize(net, jax.random.key(1), images)
    variables = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), dtype), variables)
    return variables | {"batch_stats": jax.tree.map(jnp.abs, variables["batch_stats"])}


def run(net, variables, images):
    """Features, updated statistics, gradients in parameters and images; inference features and their gradient."""
    dtype = jax.tree.leaves(variables["params"])[0].dtype

    def loss(params, images):
        features, updated = net.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        weights = jnp.cos(jnp.arange(features.size, dtype=jnp.float32)).reshape(features.shape)
        return (features.astype(dtype) * weights).sum(), (features, updated)

    gradients, (features, updated) = jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], images)

    @jit
    def infer(variables, images):
        features, pull = jax.vjp(lambda x: net.apply(variables, x, train=False), images)
        return features, pull(jnp.ones_like(features))

    inference, saliency = infer(variables, images)
    return {
        "features": features,
        "updated": updated,
        "gradients": gradients,
        "inference": inference,
        "saliency": saliency,
    }


def relative_errors(got, expected):
    """The largest difference of each array over its largest entry; types and shapes must be the same."""

    def error(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)

    return jax.tree.map(error, got, expected)


def assert_same_function(fast, reference, *args, tolerance=1e-11):
    """Compare values, and gradients in every argument under one random cotangent for each output."""
    value, pull = jax.vjp(jax.jit(fast), *args)
    expected, expected_pull = jax.vjp(reference, *args)
    rng = np.random.default_rng(7)
    cotangent = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), expected)
    for got, want in ((value, expected), (pull(cotangent), expected_pull(cotangent))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)
