"""Keras weight files: names of all ages, order where there are no names, and clear refusals. Keras is not needed."""

import io
import subprocess
import sys

import h5py
import jax
import numpy as np
import pytest
from backbone_variables import random_variables

from cxa_jax.errors import UserError
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.keras_import import PLACES, load_keras_weights, load_variables
from cxa_jax.models.keras_layout import CONV, canonical_names, keras_layers
from cxa_jax.models.resnet import ResNet

NETWORKS = {
    "densenet": DenseNet((1, 2)),
    "resnet": ResNet((2, 1)),
    "inception_resnet_v2": InceptionResNetV2(num_blocks=(1, 1, 2)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return network_and_variables(request.param)


@pytest.fixture(scope="module")
def densenet():
    return network_and_variables("densenet")


def network_and_variables(name):
    return NETWORKS[name], draw_variables(NETWORKS[name])


def draw_variables(module):
    """Return positive variables, the same ones at each call."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.uniform(0.5, 1, a.shape).astype(np.float32), random_variables(module))


def layer_arrays(module, variables):
    """List (name, kind, {role: array}) in the file's order."""
    layers = []
    for layer in keras_layers(module):
        arrays = {}
        for role, (top, leaf) in PLACES[layer.kind].items():
            node = variables[top]
            for key in layer.path:
                node = node.get(key, {})
            if leaf in node:
                arrays[role] = node[leaf]
        layers.append((layer.name, layer.kind, arrays))
    return layers


def write_groups(path, layers, array_name="{layer}/{role}:0", chunked=False):
    """Write the layer-group layout: attributes `layer_names` and `weight_names`, with layers that have no weights."""
    with h5py.File(path, "w") as file:
        names = np.array([name.encode() for name, _, _ in [("input_1", None, {}), *layers]])
        pieces = np.array_split(names, 3) if chunked else [names]
        for i, piece in enumerate(pieces):
            file.attrs[f"layer_names{i}" if chunked else "layer_names"] = piece
        file.create_group("input_1").attrs["weight_names"] = np.zeros(0)
        for name, _, arrays in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [array_name.format(layer=name, role=role).encode() for role in arrays]
            for role, array in arrays.items():
                group[array_name.format(layer=name, role=role)] = array


def write_variables(path, layers, named=True):
    """Write the layout of `.weights.h5`: layers/<class>_<number>/vars/<number>."""
    counts = {}
    with h5py.File(path, "w") as file:
        for name, kind, arrays in layers:
            number = counts[kind] = counts.get(kind, -1) + 1
            cls = "conv2d" if kind == CONV else "batch_normalization"
            group = file.create_group(f"layers/{cls}_{number}/vars" if number else f"layers/{cls}/vars")
            if named:
                group.attrs["name"] = name
            for i, array in enumerate(arrays.values()):
                group[str(i)] = array


def assert_loads(module, path, variables):
    loaded = load_variables(module, path, "network")
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("chunked", [False, True])
def test_layer_groups(network, tmp_path, chunked):
    module, variables = network
    write_groups(tmp_path / "w.h5", layer_arrays(module, variables), chunked=chunked)
    assert_loads(module, tmp_path / "w.h5", variables)


@pytest.mark.parametrize("named", [False, True])
def test_numbered_groups(network, tmp_path, named):
    module, variables = network
    write_variables(tmp_path / "w.weights.h5", layer_arrays(module, variables), named)
    assert_loads(module, tmp_path / "w.weights.h5", variables)


CUT = {"resnet": (ResNet((1, 2, 1, 1)), 8), "inception_resnet_v2": (NETWORKS["inception_resnet_v2"], 16)}


def write_unnamed(path, layers):
    write_variables(path, layers, named=False)


@pytest.mark.parametrize("write", [write_groups, write_unnamed])
@pytest.mark.parametrize("name", CUT)
def test_a_cut_network_takes_the_first_layers(tmp_path, name, write):
    whole, stride = CUT[name]
    variables, module = draw_variables(whole), whole.clone(stride=stride)
    layers = layer_arrays(whole, variables)
    write(tmp_path / "w.weights.h5", layers)
    expected = {
        kind: {layer: variables[kind][layer] for layer in tree} for kind, tree in random_variables(module).items()
    }
    assert len(expected["params"]) < len(variables["params"])
    assert_loads(module, tmp_path / "w.weights.h5", expected)
    assert_loads(whole.clone(stride=stride, stride_by="dilate"), tmp_path / "w.weights.h5", variables)


@pytest.mark.parametrize(("missing", "place"), [("conv3_block2_2_conv", "stage2_block2/conv2/kernel"), (None, None)])
def test_a_cut_network_takes_no_other_file(tmp_path, missing, place):
    whole, stride = CUT["resnet"]
    layers = [layer for layer in layer_arrays(whole, draw_variables(whole)) if layer[0] != missing]
    if missing:
        message = f"no array for params/{place}"
    else:
        layers.append(("conv6_block1_1_conv", CONV, {"kernel": np.ones((1, 1, 8, 8), "f")}))
        message = "'conv6_block1_1_conv/kernel:0' .* has no place"
    write_groups(tmp_path / "w.h5", layers)
    with pytest.raises(UserError, match=message):
        load_variables(whole.clone(stride=stride), tmp_path / "w.h5", "resnet50")


def test_names_win_over_order(network, tmp_path):
    module, variables = network
    layers = layer_arrays(module, variables)
    order = np.random.default_rng(1).permutation(len(layers))
    write_groups(tmp_path / "w.h5", [layers[i] for i in order])
    assert_loads(module, tmp_path / "w.h5", variables)


def test_unknown_names_go_by_order(network, tmp_path):
    module, variables = network
    layers = [(f"renamed_{i}", kind, arrays) for i, (_, kind, arrays) in enumerate(layer_arrays(module, variables))]
    write_groups(tmp_path / "w.h5", layers)
    assert_loads(module, tmp_path / "w.h5", variables)


def test_published_densenet_names(densenet, tmp_path):
    module, variables = densenet
    layers = [
        (name.replace("conv1_conv", "conv1/conv").replace("conv1_bn", "conv1/bn"), kind, arrays)
        for name, kind, arrays in layer_arrays(module, variables)
    ]
    write_groups(tmp_path / "w.h5", layers)
    assert_loads(module, tmp_path / "w.h5", variables)


def test_old_resnet_names(tmp_path):
    module, variables = network_and_variables("resnet")
    old_roles = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    layers = []
    for name, kind, arrays in layer_arrays(module, variables):
        if name.startswith("conv1"):
            old = "conv1" if kind == CONV else "bn_conv1"
        else:
            stage, block, step, _ = name.split("_") if name.count("_") == 3 else (*name.split("_"), None)
            branch = "1" if step == "0" else "2" + "_abc"[int(step)]
            old = f"{'res' if kind == CONV else 'bn'}{stage[-1]}{' abcdef'[int(block[-1])]}_branch{branch}"
        layers.append((old, kind, {old_roles.get(role, role): array for role, array in arrays.items()}))
    assert "res2a_branch1" in [name for name, _, _ in layers]
    layers.sort(key=lambda layer: layer[0], reverse=True)  # the shortcut of a block has the shape of its last step
    write_groups(tmp_path / "w.h5", layers, array_name="{layer}_{role}_1:0")
    assert_loads(module, tmp_path / "w.h5", variables)


def test_automatic_numbers_become_ranks():
    names = ["conv2d_211", "batch_normalization_99", "block35_1_conv", "conv2d_204", "batch_normalization_100"]
    expected = ["conv2d_1", "batch_normalization_0", "block35_1_conv", "conv2d_0", "batch_normalization_1"]
    assert canonical_names(names) == expected
    assert canonical_names(["conv2d_10", "conv2d", "conv2d_9"]) == ["conv2d_2", "conv2d_0", "conv2d_1"]


def test_whole_models_and_optimizer_state(densenet, tmp_path):
    module, variables = densenet
    write_groups(tmp_path / "groups.h5", layer_arrays(module, variables))
    with h5py.File(tmp_path / "groups.h5") as source, h5py.File(tmp_path / "model.h5", "w") as file:
        source.copy(source["/"], file, "model_weights")
        file["optimizer_weights/momentum"] = np.zeros(3)
    assert_loads(module, tmp_path / "model.h5", variables)
    write_variables(tmp_path / "w.weights.h5", layer_arrays(module, variables))
    with h5py.File(tmp_path / "w.weights.h5", "a") as file:
        file["optimizer/vars/0"] = np.zeros((), np.int64)
    assert_loads(module, tmp_path / "w.weights.h5", variables)


@pytest.mark.parametrize("top", ["predictions", "fc1000"])
def test_known_top_is_dropped(densenet, tmp_path, top):
    module, variables = densenet
    dense = (top, "dense", {"kernel": np.zeros((8, 1000), "f"), "bias": np.zeros(1000, "f")})
    write_groups(tmp_path / "w.h5", [*layer_arrays(module, variables), dense])
    assert_loads(module, tmp_path / "w.h5", variables)


def test_other_dense_layers_are_refused(densenet, tmp_path):
    module, variables = densenet
    dense = ("my_head", "dense", {"kernel": np.zeros((8, 2), "f"), "bias": np.zeros(2, "f")})
    write_groups(tmp_path / "w.h5", [*layer_arrays(module, variables), dense])
    with pytest.raises(UserError, match=r"my_head/kernel:0' \(8, 2\) has no place"):
        load_variables(module, tmp_path / "w.h5", "densenet121")


def test_another_depth_is_refused(densenet, tmp_path):
    module, variables = densenet
    write_groups(tmp_path / "w.h5", layer_arrays(module, variables))
    with pytest.raises(
        UserError, match=r"no array for params/block2/layer3/norm1/scale \(112,\).*conv3_block3_0_bn/gamma"
    ):
        load_variables(DenseNet((1, 3)), tmp_path / "w.h5", "densenet121")
    with pytest.raises(UserError, match=r"'bn/gamma:0' \(112,\) float32 does not fit params/norm/scale \(80,\)"):
        load_variables(DenseNet((1, 1)), tmp_path / "w.h5", "densenet121")
    write_groups(tmp_path / "w.h5", layer_arrays(*network_and_variables("resnet")))
    with pytest.raises(UserError, match=r"'conv2_block2_1_conv/kernel:0' \(1, 1, 256, 64\) has no place"):
        load_variables(ResNet((1, 1)), tmp_path / "w.h5", "resnet50")


@pytest.mark.parametrize("write", [write_groups, write_variables])
def test_another_family_is_refused_at_its_first_array(densenet, tmp_path, write):
    write(tmp_path / "w.h5", layer_arrays(*network_and_variables("inception_resnet_v2")))
    with pytest.raises(UserError, match=r"\(3, 3, 3, 32\).*does not fit params/stem_conv/kernel \(7, 7, 3, 64\)"):
        load_variables(densenet[0], tmp_path / "w.h5", "densenet121")


def change_first(layers, role, change):
    """Change the array `role` of the first layer that has it."""
    for i, (name, kind, arrays) in enumerate(layers):
        if role in arrays:
            layers[i] = (name, kind, change(dict(arrays)))
            return layers
    raise AssertionError(role)


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("gamma", lambda a: a | {"gamma": a["gamma"] * np.nan}, "conv1_bn/gamma:0.*not finite"),
        ("gamma", lambda a: a | {"gamma": np.ones(64, np.int32)}, "conv1_bn/gamma:0.*int32 does not fit"),
        ("gamma", lambda a: {"beta": a["beta"], **a}, "conv1_bn/beta:0.*does not fit.*gamma"),
        ("beta", lambda a: {k: v for k, v in a.items() if k != "moving_variance"}, "no array for batch_stats.*var"),
        ("beta", lambda a: a | {"extra": np.ones(64, "f")}, "conv1_bn/extra:0.*no place"),
        ("kernel", lambda a: {"kernel": a["kernel"].transpose(3, 2, 0, 1)}, r"\(64, 3, 7, 7\).*does not fit"),
        ("kernel", lambda a: a | {"bias": np.ones(64, "f")}, "conv1_conv/bias:0.*no place"),
    ],
)
def test_changed_arrays_are_refused(densenet, tmp_path, role, change, message):
    module, variables = densenet
    write_groups(tmp_path / "w.h5", change_first(layer_arrays(module, variables), role, change))
    with pytest.raises(UserError, match=message):
        load_variables(module, tmp_path / "w.h5", "densenet121")


def test_an_array_of_no_layer_is_refused(densenet, tmp_path):
    module, variables = densenet
    write_groups(tmp_path / "w.h5", layer_arrays(module, variables))
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file["stray"] = np.ones(3)
    with pytest.raises(UserError, match=r"'/stray' \(3,\) belongs to no layer"):
        load_variables(module, tmp_path / "w.h5", "densenet121")


def test_a_huge_claim_is_refused_unread(densenet, tmp_path):
    module, variables = densenet
    layers = layer_arrays(module, variables)
    write_groups(tmp_path / "w.h5", layers)
    with h5py.File(tmp_path / "w.h5", "a") as file:
        del file["conv1_conv/conv1_conv/kernel:0"]
        file["conv1_conv"].create_dataset("conv1_conv/kernel:0", (2**20, 2**20, 3, 64), "f4", chunks=(1, 1, 3, 64))
    with pytest.raises(UserError, match="does not fit"):
        load_variables(module, tmp_path / "w.h5", "densenet121")


@pytest.mark.parametrize("write", [write_groups, write_unnamed])
@pytest.mark.parametrize(("stride", "norm"), [(8, "transition2"), (16, "transition3"), (32, "")])
def test_a_cut_densenet_takes_the_first_stages_of_the_whole_files(tmp_path, write, stride, norm):
    """Its closing norm is the one that the whole network has there."""
    module = DenseNet((1, 2, 1, 1))
    whole, path = draw_variables(module), tmp_path / "w.h5"
    write(path, layer_arrays(module, whole))
    found = load_variables(module.clone(stride=stride), path, "densenet121")
    shapes = jax.eval_shape(module.clone(stride=stride).init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
    for kind, tree in found.items():
        expected = {part: whole[kind][part] for part in tree}
        if norm:
            expected["norm"] = whole[kind][norm]["norm"]
        jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_densenet_takes_the_whole_file(densenet, tmp_path, stride):
    module, variables = densenet
    write_groups(tmp_path / "w.h5", layer_arrays(module, variables))
    dilated = module.clone(stride=stride, stride_by="dilate")
    jax.tree.map(np.testing.assert_array_equal, load_variables(dilated, tmp_path / "w.h5", "densenet121"), variables)


def test_a_cut_densenet_refuses_files_of_other_networks(tmp_path):
    """The kept stages alone would fit; what the whole network has behind them must be there, and nothing more."""
    module = DenseNet((1, 1, 2, 1))
    layers = layer_arrays(module, random_variables(module))
    write_groups(tmp_path / "w.h5", layers)
    cut = module.clone(stride=8)
    load_variables(cut, tmp_path / "w.h5", "densenet121")
    for other, word in (((1, 1, 1, 1), "'conv4_block2.*has no place"), ((1, 1, 3, 1), "no layer 'conv4_block3_0_bn'")):
        with pytest.raises(UserError, match=word):
            load_variables(cut.clone(num_layers=other), tmp_path / "w.h5", "densenet121")
    for missing in ("conv2_block1_0_bn", "pool3_bn"):
        write_groups(tmp_path / "less.h5", [layer for layer in layers if layer[0] != missing])
        with pytest.raises(UserError, match=f"no array for .*{missing}"):
            load_variables(cut, tmp_path / "less.h5", "densenet121")


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(UserError, match="missing.h5: no such file"):
        load_keras_weights("densenet121", tmp_path / "missing.h5")
    with pytest.raises(UserError, match="'vgg16' is not one of densenet121"):
        load_keras_weights("vgg16", tmp_path / "missing.h5")
    (tmp_path / "page.h5").write_text("<html>Not found</html>")
    with pytest.raises(UserError, match="page.h5 is not a readable HDF5"):
        load_keras_weights("densenet121", tmp_path / "page.h5")
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    with pytest.raises(UserError, match="zip archive"):
        load_keras_weights("densenet121", tmp_path / "archive.npz")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.ones(3)
    with pytest.raises(UserError, match="holds no Keras weights"):
        load_keras_weights("densenet121", tmp_path / "other.h5")


@pytest.mark.parametrize("write", [write_groups, write_variables])
def test_damaged_files_are_refused_or_right(densenet, tmp_path, write):
    module, variables = densenet
    write(tmp_path / "whole.h5", layer_arrays(module, variables))
    whole = (tmp_path / "whole.h5").read_bytes()
    rng = np.random.default_rng(3)
    num_refused = 0
    for trial in range(12):
        data = io.BytesIO(whole)
        if trial % 2:
            data.truncate(int(rng.integers(len(whole))))
        else:
            data.seek(int(rng.integers(min(len(whole), 20_000))))
            data.write(rng.bytes(256))
        (tmp_path / "damaged.h5").write_bytes(data.getvalue())
        try:
            load_variables(module, tmp_path / "damaged.h5", "densenet121")
        except UserError as error:
            num_refused += 1
            assert "damaged.h5" in str(error)
    assert num_refused >= 6  # every cut file at least


def test_keras_is_not_imported():
    program = "import sys, cxa_jax.models.keras_import; sys.exit('keras' in sys.modules or 'tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
