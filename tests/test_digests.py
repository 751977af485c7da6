"""Digests: the same for the same content, another for any change."""

import jax.numpy as jnp
import numpy as np
import pytest

from cxa_jax.digests import digest_arrays, digest_json

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.float32(1)}}


def test_the_place_of_an_array_does_not_matter():
    assert digest_arrays({"x": np.ones(3, np.float32)}) == digest_arrays({"x": jnp.ones(3)})


@pytest.mark.parametrize(
    "changed",
    [
        TREE | {"a": np.nextafter(TREE["a"], 9)},
        TREE | {"a": TREE["a"].reshape(3, 2)},
        TREE | {"b": {"d": np.float32(1)}},
        TREE | {"b": {"c": np.float64(1)}},
        {"a": TREE["a"]},
    ],
)
def test_any_change_of_bits_shape_type_or_name_shows(changed):
    assert digest_arrays(changed) != digest_arrays(TREE) == digest_arrays(dict(reversed(TREE.items())))


def test_json_is_compared_by_content():
    assert digest_json({"a": 1, "b": [float("nan")]}) == digest_json({"b": [float("nan")], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
