"""The weights file gives back what was written, and whatever is wrong with one ends in one message."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from cxa_jax.digests import digest_arrays
from cxa_jax.errors import UserError
from cxa_jax.weights_file import DESCRIPTION, DTYPES, KEY, read_weights, round_parameters, write_weights

DESCRIBED = {
    "dtype": "float16", "dtype_reason": "measured", "largest_logit_difference": 0.003, "config": {"name": "x"},
    "normalization": "min_max", "threshold": 0.4, "threshold_origin": "dev", "calibration": {"scale": 1.5, "bias": 0},
    "is_phantom": False, "box_rule": {"kind": "half_max"}, "fingerprint": "f",
    "progress": {"best_step": 7, "epoch": 2, "best_loss": 0.25},
    "views": {"PA": 3}, "companions": {"input_statistics.json": {"num_images": 3}},
}  # fmt: skip


def draw_variables(rng):
    """Return a small tree with numbers of many sizes; statistics beyond what float16 holds."""
    params = {
        "backbone": {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)) * 10.0 ** rng.integers(-6, 2, (3, 3, 2, 4))}},
        "classifier": {"logit": {"kernel": rng.normal(size=(4, 1)), "bias": rng.normal(size=1)}},
    }
    statistics = {"backbone": {"norm": {"mean": rng.normal(size=4), "var": np.array([1e5, 1e-9, 1, 2])}}}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), {"params": params, "batch_stats": statistics})


@pytest.fixture
def variables():
    return draw_variables(np.random.default_rng(int.from_bytes(os.urandom(4))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, variables, dtype):
    path = tmp_path / "a.safetensors"
    write_weights(path, variables, DESCRIBED | {"dtype": dtype})
    stored = read_weights(path)
    read, rounded = stored.to_tree(variables), round_parameters(variables, dtype)
    for name, found in jax.tree_util.tree_leaves_with_path(read):
        want = variables
        for key in name:
            want = want[key.key]
        if name[0].key == "params":
            want = want.astype(dtype).astype(np.float32)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, want)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, rounded))
    assert {name: stored.description[name] for name in DESCRIBED} == DESCRIBED | {"dtype": dtype}
    assert set(stored.description) == set(DESCRIPTION) and not list(tmp_path.glob("*.tmp"))
    with safe_open(path, framework="numpy") as file:  # as any reader of the format sees it
        assert set(file.metadata()) == {KEY}
        assert file.get_tensor("params/classifier/logit/bias").dtype == dtype
        assert file.get_tensor("batch_stats/backbone/norm/var").dtype == np.float32


def test_the_same_network_is_the_same_bytes(tmp_path, variables):
    for name in "ab":
        write_weights(tmp_path / name, variables, DESCRIBED)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_write_that_fails_leaves_the_former_file(tmp_path, variables, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("former")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            write_weights(path, variables, DESCRIBED)
    assert path.read_text() == "former" and len(list(tmp_path.iterdir())) == 1


def rewrite(path, *, tensors=None, metadata=None, **fields):
    """Write a file again with some tensors or fields of its description replaced; None takes away."""
    with safe_open(path, framework="numpy") as file:
        told = json.loads(file.metadata()[KEY])
        kept = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    told |= {"tensors_sha256": digest_arrays(kept)} | fields
    told = {name: value for name, value in told.items() if value is not ...}
    path.write_bytes(safetensors.numpy.save(kept, {KEY: json.dumps(told)} if metadata is None else metadata))


@pytest.fixture
def path(tmp_path, variables):
    write_weights(tmp_path / "a.safetensors", variables, DESCRIBED)
    return tmp_path / "a.safetensors"


def refused(path, message, mould=None):
    with pytest.raises(UserError, match=message) as caught:
        stored = read_weights(path)
        assert mould is not None, "it was read"
        stored.to_tree(mould)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize("share", [0, 1e-3, 0.01, 0.3, 0.9, 0.999])
def test_a_cut_file(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "no readable safetensors file")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"PK\x03\x04" + bytes(200), b"version https://git-lfs.github.com/"])
def test_what_is_no_safetensors_file(path, content):
    path.write_bytes(content)
    refused(path, "no readable safetensors file")


def test_every_flipped_byte_is_found(path, variables):
    content = path.read_bytes()
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    numbers = int.from_bytes(content[:8], "little") + 8
    for place in rng.integers(numbers, len(content), 20):  # of the tensors: no other sign tells
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        refused(path, "SHA-256 differs|not finite")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "no weights file of this project"),
        ({"format": "pt"}, "no weights file of this project"),
        ({KEY: "{"}, "metadata are no JSON"),
        ({KEY: "[" * 100_000}, "metadata are no JSON"),
        ({KEY: "[1]"}, "no format_version"),
        ({KEY: '{"format_version": "1"}'}, "no format_version"),
        ({KEY: "{}"}, "no format_version"),
    ],
)
def test_metadata_of_others(path, metadata, message):
    rewrite(path, metadata=metadata)
    refused(path, message)


def test_another_version(path):
    rewrite(path, format_version=2)
    refused(path, "format version 2, and this version of the project reads 1")


@pytest.mark.parametrize("field", sorted(set(DESCRIPTION) - {"format_version"}))
def test_a_field_that_lacks_or_is_wrong(path, field):
    rewrite(path, **{field: [1]})
    refused(path, f"{field} is \\[1\\]|SHA-256")
    rewrite(path, **{field: ...})
    refused(path, f"metadata lack '{field}'")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": True}, "threshold is True"),
        ({"is_phantom": 1}, "is_phantom is 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"calibration": {"scale": 1}}, "calibration.bias is None"),
        ({"calibration": {"scale": 1, "bias": "x" * 10_000}}, "calibration.bias is 'x"),
        ({"progress": {"best_step": 1, "epoch": True, "best_loss": 0}}, "progress.epoch is True"),
        ({"companions": {"../../.bashrc": {}}}, "which this version does not know"),
        ({"tensors_sha256": "0" * 64}, "SHA-256 differs"),
    ],
)
def test_values_out_of_place(path, fields, message):
    rewrite(path, **fields)
    refused(path, message)


NAME = "params/classifier/logit/kernel"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({NAME: None}, f"{NAME} is missing"),
        ({"params/else": np.ones(2, np.float16)}, "params/else has no place"),
        ({NAME: np.ones((1, 4), np.float16)}, rf"{NAME} is \[1, 4\], not \[4, 1\]"),
        ({NAME: None, "x": np.ones(2, np.float16)}, f"{NAME} is missing, and 1 more"),
        ({NAME: np.ones((4, 1), np.int32)}, f"{NAME} is int32, not float16 or float32"),
        ({NAME: np.full((4, 1), np.inf, np.float16)}, f"{NAME} has values that are not finite"),
    ],
)
def test_tensors_of_another_network(path, variables, tensors, message):
    rewrite(path, tensors=tensors)
    refused(path, message, variables)


def test_no_such_file(tmp_path):
    refused(tmp_path / "none.safetensors", "no such weights file")
    refused(tmp_path, "no such weights file")
