"""PyTorch weights in our backbone: the same function, from every kind of file, and no file that runs anything."""

import collections
import os
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch_reference
from torch_reference import compute_features, make_state, write_legacy, write_zip

from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.errors import UserError
from cxa_jax.models import BACKBONES
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.torch_files import read_state_dict
from cxa_jax.models.torch_import import load_torch_weights, load_variables

LAYERS = (1, 2, 1, 1)


def save(path, state):
    safetensors.numpy.save_file(state, path)
    return path


def run(variables, images, num_layers=LAYERS, implementation="plain"):
    module = DenseNet(num_layers=num_layers, implementation=implementation)
    return jax.jit(lambda variables, images: module.apply(variables, images, train=False))(variables, images)


def standardized(images):
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rgb = np.repeat(images / 255.0, 3, axis=-1)
    return ((rgb - mean) / deviation).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
def test_three_channels_against_numpy(tmp_path, implementation):
    state = make_state(LAYERS)
    variables = load_variables(DenseNet(num_layers=LAYERS), save(tmp_path / "a.safetensors", state), "imagenet_torch")
    images = np.random.default_rng(1).integers(0, 256, (2, 70, 64, 1), np.uint8)  # 70: odd sides on the way
    ours = run(variables, to_rgb(normalize_images(images, "imagenet_torch"), "imagenet_torch"), LAYERS, implementation)
    theirs = compute_features(state, LAYERS, standardized(images)).transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape == (2, 2, 2, theirs.shape[-1])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.max())


def test_one_channel_against_numpy(tmp_path):
    """torchxrayvision: one grey channel in [-1024, 1024]."""
    state = make_state(LAYERS, channels=1)
    state["op_threshs"] = np.zeros(18, np.float32)
    path = save(tmp_path / "a.safetensors", state)
    variables = load_variables(DenseNet(num_layers=LAYERS), path, "xrv")
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 1), np.uint8)
    ours = run(variables, to_rgb(normalize_images(images, "xrv"), "xrv"))
    grey = (2 * (images / 255.0) - 1) * 1024
    theirs = compute_features(state, LAYERS, grey.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.max())
    with pytest.raises(UserError, match="torch_normalization=xrv"):
        load_variables(DenseNet(num_layers=LAYERS), path, "imagenet_torch")


def test_every_array_of_densenet121_has_its_place(tmp_path):
    state = make_state((6, 12, 24, 16))
    path = save(tmp_path / "a.safetensors", state)
    loaded = load_torch_weights("densenet121", path, "imagenet_torch")
    images = np.zeros((1, 64, 64, 3), np.float32)
    expected = jax.eval_shape(lambda: BACKBONES["densenet121"]().init(jax.random.key(0), images))
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, dict(expected))
    kernel = loaded["params"]["block3"]["layer24"]["conv2"]["kernel"]
    theirs = state["features.denseblock3.denselayer24.conv2.weight"]
    np.testing.assert_array_equal(kernel[1, 2, 5, 7], theirs[7, 5, 1, 2])
    with pytest.raises(UserError, match="is no DenseNet"):
        load_torch_weights("densenet201", path, "imagenet_torch")
    with pytest.raises(UserError, match="is for DenseNets"):
        load_torch_weights("resnet50", path, "imagenet_torch")


@pytest.mark.parametrize(("stride", "norm"), [(8, "transition2"), (16, "transition3")])
def test_cut_and_dilated_networks_take_the_whole_file(tmp_path, stride, norm):
    path = save(tmp_path / "a.safetensors", make_state(LAYERS))
    whole, dilated, cut = (
        load_variables(DenseNet(LAYERS, **fields), path, "imagenet_torch")
        for fields in ({}, {"stride": stride, "stride_by": "dilate"}, {"stride": stride})
    )
    jax.tree.map(np.testing.assert_array_equal, dilated, whole)
    shapes = jax.eval_shape(
        DenseNet(LAYERS, stride=stride).init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)
    )
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, shapes)
    for kind, tree in cut.items():
        expected = {part: whole[kind][part] for part in tree} | {"norm": whole[kind][norm]["norm"]}
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    with pytest.raises(UserError, match="is no DenseNet"):
        load_variables(DenseNet((1, 2, 1, 2), stride=8), path, "imagenet_torch")


def old_names(state):
    """Rename as torchvision before 0.3 and CheXNet's checkpoints: module.densenet121.features...norm.1.weight."""
    renamed = {re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", name): array for name, array in state.items()}
    return {f"module.densenet121.{name}": array for name, array in renamed.items()}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("wrap", [dict, lambda state: {"epoch": 3, "state_dict": collections.OrderedDict(state)}])
def test_files_of_torch_save_and_old_names(tmp_path, monkeypatch, write, wrap):
    state = make_state(LAYERS, seed=2)
    expected = load_variables(DenseNet(num_layers=LAYERS), save(tmp_path / "a.safetensors", state), "imagenet_torch")
    write(tmp_path / "a.pt", wrap(old_names(state)), monkeypatch)
    loaded = load_variables(DenseNet(num_layers=LAYERS), tmp_path / "a.pt", "imagenet_torch")
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/cxa_jax_was_here",)


@pytest.mark.parametrize("content", [Attack(), {"a": Attack()}])
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_pickles_run_nothing(tmp_path, monkeypatch, write, content):
    write(tmp_path / "a.pt", content, monkeypatch)
    monkeypatch.setattr(os, "system", pytest.fail)
    with pytest.raises(UserError, match="system, which is not run here"):
        read_state_dict(tmp_path / "a.pt")


def test_tensors_stay_inside_their_storage(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.pt", {"x": np.arange(6, dtype=np.float32)}, monkeypatch)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        text = archive.read("archive/data.pkl")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/data/0", bytes(8))
    with pytest.raises(UserError, match="beyond its storage"):
        read_state_dict(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("features.norm5.bias"), "norm5.bias is missing"),
        (lambda state: state.update({"features.norm5.bias": np.ones(3, np.float32)}), "norm5.bias is float32"),
        (lambda state: state.update({"features.extra.bias": np.ones(3, np.float32)}), "nothing here for extra.bias"),
        (lambda state: state["features.norm5.bias"].fill(np.nan), "not finite"),
        (lambda state: state.pop("features.conv0.weight"), "0 arrays are called"),
    ],
)
def test_mismatches_are_named(tmp_path, change, message):
    state = make_state(LAYERS)
    change(state)
    with pytest.raises(UserError, match=message):
        load_variables(DenseNet(num_layers=LAYERS), save(tmp_path / "a.safetensors", state), "imagenet_torch")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / name)
    for content in (b"", b"nonsense" * 9, pickle.dumps({"a": 1}), pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_against_torch_itself(tmp_path, legacy):
    """torch writes the file and runs the network (its own convolution, norm and pools) in float64."""
    torch = pytest.importorskip("torch", reason="torch is no requirement, not even of the tests")
    functional = torch.nn.functional
    state = {name: torch.from_numpy(array) for name, array in make_state(LAYERS, seed=3).items()}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    variables = load_variables(DenseNet(num_layers=LAYERS), tmp_path / "a.pt", "imagenet_torch")
    images = np.random.default_rng(4).integers(0, 256, (2, 96, 96, 1), np.uint8)
    ours = run(variables, to_rgb(normalize_images(images, "imagenet_torch"), "imagenet_torch"))

    def conv(name, x, **options):
        return functional.conv2d(x, state[f"features.{name}.weight"].double(), **options)

    def norm_relu(name, x):
        roles = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"features.{name}.{role}"].double() for role in roles)).relu()

    x = norm_relu("norm0", conv("conv0", torch.from_numpy(standardized(images)), stride=2, padding=3))
    x = functional.max_pool2d(x, 3, 2, 1)
    for i, n in enumerate(LAYERS, start=1):
        for j in range(1, n + 1):
            name = f"denseblock{i}.denselayer{j}"
            new = conv(f"{name}.conv1", norm_relu(f"{name}.norm1", x))
            x = torch.cat([x, conv(f"{name}.conv2", norm_relu(f"{name}.norm2", new), padding=1)], 1)
        if i < 4:
            x = functional.avg_pool2d(conv(f"transition{i}.conv", norm_relu(f"transition{i}.norm", x)), 2, 2)
    theirs = norm_relu("norm5", x).permute(0, 2, 3, 1).numpy()
    reference = compute_features({k: v.numpy() for k, v in state.items()}, LAYERS, standardized(images))
    np.testing.assert_allclose(reference.transpose(0, 2, 3, 1), theirs, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.max())
    assert torch_reference.EPSILON == torch.nn.BatchNorm2d(1).eps
