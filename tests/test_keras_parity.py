"""The backbones against the Keras applications: same weights through files, same features, statistics, gradients."""

import keras_reference as reference  # first: it chooses Keras' backend

# isort: split
import h5py
import jax
import numpy as np
import pytest
from quick import QUICK, slow

from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.models.backbones import BACKBONES
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.keras_import import KERAS_PREPROCESSING, PLACES, load_keras_weights, load_variables
from cxa_jax.models.keras_layout import CONV, NORM, canonical_names, keras_layers
from cxa_jax.models.resnet import ResNet

SMALLEST = {"densenet121": 64, "densenet201": 64, "resnet50": 64, "inception_resnet_v2": 75}
RELATIVE_TO_SCALE = 1e-5  # float32
STATISTICS_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-7  # float64


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return a function backbone -> (Keras model, our variables), through both file layouts; each built once."""
    made = {}

    def get(backbone):
        if backbone not in made:
            folder = tmp_path_factory.mktemp(backbone)
            model = reference.create_application(backbone, np.random.default_rng(1))
            model.save_weights(folder / "new.weights.h5")
            model.save(folder / "groups.h5")
            new = load_keras_weights(backbone, folder / "new.weights.h5")
            jax.tree.map(np.testing.assert_array_equal, new, load_keras_weights(backbone, folder / "groups.h5"))
            with h5py.File(folder / "new.weights.h5", "a") as file:  # without names there is only Keras' order
                file.visititems(lambda _, group: group.attrs.pop("name", None))
            jax.tree.map(np.testing.assert_array_equal, new, load_keras_weights(backbone, folder / "new.weights.h5"))
            made[backbone] = model, new
        return made[backbone]

    return get


def assert_same_features(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= RELATIVE_TO_SCALE * np.abs(theirs).max()


def random_images(seed, *shape):
    return np.random.default_rng(seed).uniform(0, 1, (*shape, 3)).astype(np.float32)


def check_inference(written, backbone, height, width, compiler_options=None):
    model, variables = written(backbone)
    images = random_images(2, 1, height, width)
    ours = jax.jit(BACKBONES[backbone]().apply, compiler_options=compiler_options)(variables, images)
    assert_same_features(np.asarray(ours), reference.infer(model, images, compiler_options))


@pytest.mark.parametrize("backbone", ["densenet121", slow("densenet201"), "resnet50", "inception_resnet_v2"])
def test_features_small(written, backbone):
    check_inference(written, backbone, SMALLEST[backbone], SMALLEST[backbone] + 22, QUICK)


STAGE_ENDS = {
    "densenet121": {8: "pool3_relu", 16: "pool4_relu"},
    "resnet50": {8: "conv3_block4_out", 16: "conv4_block6_out"},
    "inception_resnet_v2": {8: "block35_10_ac", 16: "block17_20_ac"},
}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", STAGE_ENDS)
def test_a_cut_network_ends_at_a_layer_of_keras(written, backbone, tmp_path):
    model, whole = written(backbone)
    model.save(tmp_path / "groups.h5")
    images = random_images(2, 1, SMALLEST[backbone], SMALLEST[backbone] + 22)
    ends = [model.get_layer(name).output for name in STAGE_ENDS[backbone].values()]
    theirs = reference.infer(reference.keras.Model(model.inputs, ends), images, QUICK)
    for stride, expected in zip(STAGE_ENDS[backbone], theirs, strict=True):
        module = BACKBONES[backbone](stride=stride)
        variables = load_variables(module, tmp_path / "groups.h5", backbone)
        for kind, tree in variables.items():
            expected_tree = {name: whole[kind][name] for name in tree}
            if backbone == "densenet121":  # closed by the norm of the transition there
                expected_tree["norm"] = whole[kind][f"transition{len(module.kept_layers)}"]["norm"]
            jax.tree.map(np.testing.assert_array_equal, tree, expected_tree)
        features = jax.jit(module.apply, compiler_options=QUICK)(variables, images)
        assert_same_features(np.asarray(features), expected)
        assert module.num_features == features.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", STAGE_ENDS)
def test_dilated_cells_are_those_of_keras(written, backbone, tmp_path):
    model, _ = written(backbone)
    model.save(tmp_path / "groups.h5")
    images = random_images(2, 1, SMALLEST[backbone] + 32, SMALLEST[backbone] + 22)
    expected = reference.infer(model, images, QUICK)
    module = BACKBONES[backbone](stride=8, stride_by="dilate")
    variables = load_variables(module, tmp_path / "groups.h5", backbone)
    features = jax.jit(module.apply, compiler_options=QUICK)(variables, images)
    assert_same_features(np.asarray(features)[:, ::4, ::4], expected)


@pytest.mark.parametrize("backbone", SMALLEST)
def test_preprocessing(backbone):
    grey = np.random.default_rng(8).integers(0, 256, (2, 9, 7, 1), np.uint8)
    method = KERAS_PREPROCESSING[backbone]
    ours = to_rgb(normalize_images(grey, method), method)
    theirs = reference.PREPROCESS[backbone](np.repeat(grey, 3, axis=-1).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 193])
@pytest.mark.parametrize("backbone", SMALLEST)
def test_features(written, backbone, size):
    check_inference(written, backbone, size, size)


@pytest.mark.parametrize("backbone", SMALLEST)
def test_layers_stand_in_keras_order(written, backbone):
    model, _ = written(backbone)
    keras_names = canonical_names([layer.name for layer in model.layers if layer.weights])
    ours = keras_layers(BACKBONES[backbone]())
    for kind in {layer.kind for layer in ours}:
        expected = [layer.name for layer in ours if layer.kind == kind]
        assert [name for name in keras_names if name in expected] == expected
    assert len(keras_names) == len(ours)


def check_training(module, model, variables, images):
    """Compare training mode: features and statistics to their scale, each gradient to its norm."""
    features = jax.eval_shape(module.apply, variables, images)
    cotangents = np.random.default_rng(3).normal(size=features.shape).astype(images.dtype)

    def loss(params, batch_stats, x):
        out, new = module.apply({"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"])
        return (out * cotangents).sum(), (out, new["batch_stats"])

    step = jax.jit(jax.grad(loss, has_aux=True))
    ours, (out, batch_stats) = step(variables["params"], variables["batch_stats"], images)
    theirs_out, statistics, gradients = reference.train_outputs(model, images, cotangents)
    assert np.abs(out - theirs_out).max() <= STATISTICS_TOLERANCE * np.abs(theirs_out).max()
    theirs = by_canonical_name(statistics | gradients)
    assert len(theirs) == len(jax.tree.leaves((ours, batch_stats)))
    taken_out = biases_before_norms(module)
    largest = max(np.linalg.norm(g) for g in jax.tree.leaves(ours))
    for name, value in our_arrays(module, {"params": ours, "batch_stats": batch_stats}).items():
        error, scale = np.linalg.norm(value - theirs[name]), np.linalg.norm(theirs[name])
        if "moving" in name:
            assert error <= STATISTICS_TOLERANCE * scale, name
        elif name in taken_out:  # exactly 0 but for rounding
            assert max(scale, np.linalg.norm(value)) <= GRADIENT_TOLERANCE * largest, name
        else:
            assert error <= GRADIENT_TOLERANCE * scale, name


def biases_before_norms(module):
    """Name the convolution biases that a batch norm takes out of the function again."""
    if isinstance(module, InceptionResNetV2):  # its last block has no ReLU: the 1x1 convolution and norm follow at once
        return {f"block8_{module.num_blocks[-1]}_conv/bias"}
    return {f"{layer.name}/bias" for layer in keras_layers(module) if layer.kind == CONV}


def by_canonical_name(arrays):
    layers = list(dict.fromkeys(path.split("/")[0] for path in arrays))
    names = dict(zip(layers, canonical_names(layers), strict=True))
    return {f"{names[path.split('/')[0]]}/{path.split('/')[1]}": np.asarray(value) for path, value in arrays.items()}


def our_arrays(module, tree):
    """Name the arrays of our tree as Keras does: 'conv1_conv/kernel'."""
    arrays = {}
    for layer in keras_layers(module):
        for role, (top, leaf) in PLACES[layer.kind].items():
            node = tree[top]
            for key in layer.path:
                node = node.get(key, {})
            if leaf in node:
                arrays[f"{layer.name}/{role}"] = np.asarray(node[leaf])
    assert sum(layer.kind == NORM for layer in keras_layers(module)) * 2 == len(jax.tree.leaves(tree["batch_stats"]))
    return arrays


def small(create, num_blocks):
    return lambda rng: create(num_blocks, rng)


def full(backbone):
    return lambda rng: reference.create_application(backbone, rng)


TRAINED = {
    "small densenet": (DenseNet((1, 2, 1, 1)), small(reference.create_small_densenet, (1, 2, 1, 1))),
    "small resnet": (ResNet((2, 1)), small(reference.create_small_resnet, (2, 1))),
    "small inception_resnet_v2": (
        InceptionResNetV2(num_blocks=(1, 1, 1)),
        small(reference.create_small_inception_resnet_v2, (1, 1, 1)),
    ),
    **{backbone: (BACKBONES[backbone](), full(backbone)) for backbone in SMALLEST},
}


@pytest.mark.parametrize(
    "network", [slow(name) if name in SMALLEST or "inception" in name else name for name in TRAINED]
)
def test_training_in_float64(network, tmp_path):
    # The small ones have few blocks, but built by Keras' own code. In double precision what is left is the formula.
    with reference.double_precision():
        module, create = TRAINED[network]
        model = create(np.random.default_rng(4))
        model.save_weights(tmp_path / "new.weights.h5")
        variables = jax.tree.map(np.float64, load_variables(module, tmp_path / "new.weights.h5", network))
        images = random_images(5, 2, 117, 96).astype(np.float64)
        check_training(module.clone(dtype=np.float64), model, variables, images)
