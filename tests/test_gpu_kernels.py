"""The GPU kernels, run as plain JAX: the same DenseNet, and each kernel the operations that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quick import slow
from same_function import assert_same_function, perturbed_variables, random_array, relative_errors, run

from cxa_jax.errors import UserError
from cxa_jax.models import dense_kernels, fused_norms, norm_kernel, pool_kernel
from cxa_jax.models.backbones import select_implementation
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.fused_convolutions import NHWC, conv_1x1
from cxa_jax.models.fused_norms import Affine, Moments
from cxa_jax.models.fused_pools import max_pool_3x3
from cxa_jax.models.fused_stem import convolve_blocks
from cxa_jax.models.kernel_tiles import choose_rows, is_available

EPSILON = 1e-3
KERNELS = ("dense_bottleneck", "dense_undo_bottleneck", "norm_sums", "undo_max_pool")


def random_norm(channels, seed=0):
    moments = Moments(random_array(channels, seed=seed), jnp.abs(random_array(channels, seed=seed + 1)) + 0.1)
    return moments, Affine(random_array(channels, seed=seed + 2), random_array(channels, seed=seed + 3))


def create(implementation, dtype=jnp.float32, **options):
    return DenseNet((2, 2, 1), dtype=dtype, implementation=implementation, **options)


def count_kernels(net, images):
    """How often the gradient of the training graph calls each kernel."""
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def loss(params):
        features, _ = net.apply(variables_of(params), images, train=True, mutable=["batch_stats"])
        return features.sum()

    def variables_of(params):
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables["batch_stats"])
        return {"params": params, "batch_stats": zeros}

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jax.tree.map(lambda a: jnp.zeros(a.shape), variables["params"]))
    names = [eqn.params["name"] for eqn in walk(jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]
    return {name: names.count(name) for name in KERNELS}


def walk(jaxpr):
    """All equations of a jaxpr, those within others included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from walk(inner)


def test_a_training_graph_calls_the_kernels():
    images = jnp.zeros((4, 64, 64, 3))
    counts = count_kernels(create("kernels"), images)
    assert counts == {"dense_bottleneck": 5, "dense_undo_bottleneck": 5, "norm_sums": 6, "undo_max_pool": 1}
    assert set(count_kernels(create("fused"), images).values()) == {0}
    assert count_kernels(create("kernels", stride=8, stride_by="dilate"), images) == counts
    cut = {"dense_bottleneck": 4, "dense_undo_bottleneck": 4, "norm_sums": 5, "undo_max_pool": 1}
    assert count_kernels(create("kernels", stride=8), images) == cut


@pytest.mark.parametrize(
    ("batch", "height", "width", "options"),
    [
        (4, 64, 64, {}),
        (2, 96, 32, {"remat": True}),
        slow(4, 64, 64, {"remat": True}),
        slow(2, 96, 32, {}),
        slow(4, 64, 64, {"stride": 8}),
        slow(4, 64, 64, {"stride": 8, "stride_by": "dilate"}),
    ],
)
def test_equals_plain_in_float64(float64, batch, height, width, options):
    """Blocks of 16x16, 8x8 and 4x4 pixels an image and fewer: some tiles are whole, some the smallest there is."""
    images = jnp.asarray(np.random.default_rng(1).random((batch, height, width, 3)))
    plain, kernels = (create(name, jnp.float64, **options) for name in ("plain", "kernels"))
    plain = plain.clone(remat=False)
    variables = perturbed_variables(plain, images, jnp.float64)
    errors = relative_errors(run(kernels, variables, images), run(plain, variables, images))
    assert max(jax.tree.leaves(errors)) < 1e-9


def test_equals_plain_where_tiles_do_not_fit(float64):
    """One image of odd sides: the blocks are left to XLA, norm and pools cut as they can."""
    images = jnp.asarray(np.random.default_rng(1).random((1, 45, 70, 3)))
    assert count_kernels(create("kernels", jnp.float64), images)["dense_bottleneck"] == 0
    plain, kernels = create("plain", jnp.float64), create("kernels", jnp.float64)
    variables = perturbed_variables(plain, images, jnp.float64)
    errors = relative_errors(run(kernels, variables, images), run(plain, variables, images))
    assert max(jax.tree.leaves(errors)) < 1e-9


def test_equals_plain_in_float32():
    images = jnp.asarray(np.random.default_rng(1).random((4, 64, 64, 3)), jnp.float32)
    variables = perturbed_variables(create("plain"), images, jnp.float32)
    errors = relative_errors(run(create("kernels"), variables, images), run(create("plain"), variables, images))
    assert max(jax.tree.leaves(errors)) < 1e-4


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_the_plain_graph():
    images = jnp.asarray(np.random.default_rng(1).random((4, 64, 64, 3)), jnp.float32)
    variables = perturbed_variables(create("plain"), images, jnp.float32)
    exact = run(create("plain"), variables, images)

    def distance(implementation):
        result = run(create(implementation, jnp.bfloat16), variables, images)
        assert result["features"].dtype == jnp.bfloat16
        squares = jax.tree.map(
            lambda a, b: np.square(np.asarray(a, np.float64) - np.asarray(b)).sum() / np.square(b).sum(), result, exact
        )
        return {name: np.sqrt(np.mean(jax.tree.leaves(tree))) for name, tree in squares.items()}

    kernels, plain = distance("kernels"), distance("plain")
    assert all(kernels[name] < 1.5 * plain[name] + 1e-3 for name in plain), (kernels, plain)


@pytest.mark.parametrize("num_inputs", [slow(32), 64, 96, slow(128)])  # whole steps of 64 channels, and half a one
@pytest.mark.parametrize(("pixels", "num_programs"), [((1, 16, 1), 528), slow((3, 16, 20), 528), ((3, 16, 20), 2)])
def test_1x1_half_is_its_operations(float64, monkeypatch, num_inputs, pixels, num_programs):
    """S is the first channels of a longer buffer; what is behind it stays as it was, and does not count."""
    monkeypatch.setattr(dense_kernels, "NUM_PROGRAMS", num_programs)
    features, (_, norm) = random_array(*pixels, 160), random_norm(num_inputs)
    kernel, g, g_features = (random_array(*s) for s in ((1, 1, num_inputs, 128), (*pixels, 128), (*pixels, 160)))

    def forward(x, norm, kernel):
        return conv_1x1(jax.nn.relu(x * norm.scale + norm.bias), kernel)

    expected, pull = jax.vjp(forward, features[..., :num_inputs], norm, kernel)
    y, y_moments = jax.jit(dense_kernels.bottleneck)(features, norm, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(y_moments.mean, expected.mean((0, 1, 2)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(y_moments.var, expected.var((0, 1, 2)), rtol=1e-10)

    g_buffer, *others = jax.jit(dense_kernels.undo_bottleneck)(features, g_features, norm, kernel, g)
    g_x, *expected = pull(g)
    np.testing.assert_allclose(g_buffer[..., :num_inputs], g_features[..., :num_inputs] + g_x, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(g_buffer[..., num_inputs:], g_features[..., num_inputs:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), tuple(others), tuple(expected))


@pytest.mark.parametrize("shape", [(2, 4, 6, 32), slow((3, 5, 7, 64)), (1, 3, 3, 1792), slow((2, 16, 16, 256))])
@pytest.mark.parametrize("num_programs", [528, 3])
def test_norm_and_relu_are_their_operations(float64, monkeypatch, shape, num_programs):
    monkeypatch.setattr(norm_kernel, "NUM_PROGRAMS", num_programs)
    arguments = (random_array(*shape), *random_norm(shape[-1], seed=5))
    assert_same_function(
        lambda x, m, a: norm_kernel.normalize_relu(x, m, a, EPSILON),
        lambda x, m, a: fused_norms.normalize_relu(x, m, a, EPSILON),
        *arguments,
        tolerance=1e-9,
    )


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 8, 6, 4), slow((3, 16, 32, 64)), slow((2, 10, 2, 8))])
def test_max_pool_is_its_operation(float64, shape):
    x = jnp.asarray(np.random.default_rng(3).integers(0, 4, shape), jnp.float64)  # many ties
    assert pool_kernel.takes(shape)
    assert_same_function(lambda x: max_pool_3x3(x, kernels=True), max_pool_3x3, x)


@pytest.mark.parametrize("shape", [(2, 7, 8, 4), (2, 8, 7, 4), (2, 8, 8, 6)])
def test_max_pool_of_other_shapes_is_left_to_xla(float64, shape):
    assert not pool_kernel.takes(shape)
    assert_same_function(lambda x: max_pool_3x3(x, kernels=True), max_pool_3x3, random_array(*shape))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (32, 2), (9, 12), (8, 7)])
def test_stem_on_blocks_is_the_convolution(float64, height, width):
    options = dict(window_strides=(2, 2), padding=((3, 3), (3, 3)), dimension_numbers=NHWC)

    def blocks(x, kernel):
        return convolve_blocks(
            x, kernel, options["window_strides"], options["padding"], dimension_numbers=options["dimension_numbers"]
        )

    assert_same_function(
        blocks,
        lambda x, kernel: lax.conv_general_dilated(x, kernel, **options),
        random_array(2, height, width, 3),
        random_array(7, 7, 3, 5),
    )


def test_rows_of_a_tile_divide_the_pixels():
    assert [choose_rows(n, 128) for n in (1, 49, 784, 3136, 12544)] == [1, 1, 16, 64, 128]


def test_kernels_lower_for_a_gpu(monkeypatch):
    """Triton takes them: what a GPU is sent has a call for each."""
    for module in (dense_kernels, norm_kernel, pool_kernel):
        monkeypatch.setattr(module, "interpret", lambda: False)
    net, images = create("kernels", jnp.bfloat16), jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        features, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return features.astype(jnp.float32).sum(), updated

    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(variables["params"], variables["batch_stats"], images)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") >= 5 + 5 + 6 + 1


@pytest.mark.parametrize(
    ("implementation", "backbone", "dtype", "platform", "has_kernels", "chosen"),
    [
        ("auto", "densenet121", "float32", "cpu", False, "fused"),
        ("auto", "densenet121", "bfloat16", "gpu", True, "kernels"),
        ("auto", "densenet201", "bfloat16", "gpu", True, "kernels"),
        ("auto", "densenet121", "float32", "gpu", True, "plain"),
        ("auto", "resnet50", "bfloat16", "gpu", True, "plain"),
        ("auto", "densenet121", "bfloat16", "gpu", False, "plain"),
        ("kernels", "densenet121", "float32", "gpu", True, "kernels"),
        ("plain", "densenet121", "bfloat16", "gpu", True, "plain"),
    ],
)
def test_graph_is_chosen_in_one_place(implementation, backbone, dtype, platform, has_kernels, chosen):
    assert select_implementation(implementation, backbone, dtype, platform, has_kernels) == chosen


@pytest.mark.parametrize(
    ("backbone", "platform", "has_kernels"),
    [("resnet50", "gpu", True), ("densenet121", "cpu", False), ("densenet121", "gpu", False)],
)
def test_kernels_where_they_do_not_run_are_refused(backbone, platform, has_kernels):
    with pytest.raises(UserError, match=f"implementation='kernels'.*{backbone} on {platform}.*'auto'"):
        select_implementation("kernels", backbone, "bfloat16", platform, has_kernels)


def test_kernels_are_not_available_on_a_processor():
    assert not is_available()
