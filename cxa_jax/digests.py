"""SHA-256 of arrays and of JSON, to tell a sound checkpoint from one with a flipped bit."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from cxa_jax.array_types import PyTree


def digest_arrays(tree: PyTree) -> str:
    """Return the digest of every leaf's path, type, shape and bytes; the arrays are copied to the host."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """Return the digest of a value in JSON's types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
