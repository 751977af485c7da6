"""XLA's own account of temporary memory: what remat saves, and inference on images of full size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import perturbed_variables, relative_errors, run

from cxa_jax.hlo import ANALYSIS_ONLY
from cxa_jax.models import BACKBONES, CardioXAttentionNet
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet

SHORT = {
    "densenet": partial(DenseNet, (5,)),
    "resnet": partial(ResNet, (3,)),
    "inception": partial(InceptionResNetV2, (4, 1, 1)),
}
LARGER = ("densenet201", "resnet50", "inception_resnet_v2")
CASES = [
    pytest.param(
        name, implementation, marks=[pytest.mark.slow] if "inception" in name or implementation == "plain" else []
    )
    for name in SHORT
    for implementation in ("plain", "fused")
]


def compile_gradient(net, images):
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        features, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.square(features).mean(), updated

    step = jax.jit(jax.grad(loss, has_aux=True))
    return step.lower(variables["params"], variables["batch_stats"], images).compile(ANALYSIS_ONLY)


def temp_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_remat_saves_memory(name, implementation):
    images = jax.ShapeDtypeStruct((4, 96, 96, 3), jnp.float32)
    with_remat, without = (
        temp_bytes(compile_gradient(SHORT[name](implementation=implementation, remat=remat), images))
        for remat in (True, False)
    )
    assert with_remat < 0.9 * without


@pytest.mark.parametrize("implementation", ["fused", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [partial(DenseNet, (2,)), partial(ResNet, (1,))], ids=["densenet", "resnet"])
def test_remat_is_the_same_function(make, implementation):
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3)))
        net = make(dtype=jnp.float64, implementation=implementation)
        variables = perturbed_variables(net, images, jnp.float64)
        errors = relative_errors(run(net.clone(remat=True), variables, images), run(net, variables, images))
        # Biases that a norm takes out again have a gradient of rounding error alone: any two differ.
        leaves = [e for path, e in jax.tree_util.tree_leaves_with_path(errors) if not is_normed(path)]
    assert max(leaves) < 1e-9


def is_normed(path):
    keys = [key.key for key in path if hasattr(key, "key")]
    return keys[-1] == "bias" and "conv" in keys[-2]


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("backbone", ["densenet121", *(pytest.param(b, marks=pytest.mark.slow) for b in LARGER)])
def test_one_image_of_1024_pixels_needs_less_than_2_gib(backbone, implementation):
    model = CardioXAttentionNet(BACKBONES[backbone](implementation=implementation))
    images = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert temp_bytes(jax.jit(model.apply).lower(variables, images).compile(ANALYSIS_ONLY)) < 2 * 2**30
