"""One mesh over all devices of all processes: batches split along it, everything else replicated."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from cxa_jax.array_types import PyTree
from cxa_jax.errors import UserError


def create_mesh(devices: list[jax.Device] | None = None, *, batch_sizes: Sequence[int] = ()) -> Mesh:
    """Return a one-dimensional mesh named 'data' over `devices` (all by default).

    The devices of a processor share its cores, so there as many are taken as divide all `batch_sizes`.
    """
    devices = devices or jax.devices()
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), *batch_sizes)]
    return Mesh(np.asarray(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the train state: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows divided among devices, so batch norm under jit sees global moments."""
    return NamedSharding(mesh, PartitionSpec("data"))


def fetchable(mesh: Mesh) -> NamedSharding:
    """Return the sharding of outputs [B, ...] that every process fetches: whole where other processes hold rows."""
    return replicated(mesh) if jax.process_count() > 1 else split(mesh)


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray | None:
    """Return the rows of a batch that this process' devices take, ascending; None where they take all."""
    if jax.process_count() == 1:
        return None
    slices = split(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Copy a host batch to the devices, without waiting; of several processes each copies its own rows."""
    return put(batch, split(mesh))


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy arrays, the same in every process, to all devices."""
    return put(tree, replicated(mesh))


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """Copy a host tree, the same in every process, to the devices of a sharding, without waiting."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: jax.Array | np.ndarray) -> jax.Array:  # device_put would compare all values among the processes
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(put, tree)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, num_parts: int = 1) -> None:
    """Raise UserError unless the batch divides by the devices, and each device's share by the parts it comes in."""
    if batch_size < 1 or batch_size % (mesh.size * num_parts):
        parts = f" x config.train.accumulate_steps={num_parts}" if num_parts > 1 else ""
        raise UserError(f"{field}={batch_size} must be a positive multiple of the {mesh.size} device(s){parts}")
