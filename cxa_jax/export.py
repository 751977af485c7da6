"""A trained run as one file: weights for this project, or StableHLO with them inside, which jax alone can run."""

import hashlib
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.averaged_copies import average_copies, choose_copies
from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.panels import FOOTER
from cxa_jax.trained_network import TrainedNetwork, load_trained_network
from cxa_jax.weights_export import export_weights
from cxa_jax.weights_registry import SUFFIX
from cxa_jax.workdir import describe_environment, flatten_config, to_json, write_atomically

log = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda")
ARTEFACT, DESCRIPTION = "model.stablehlo", "model.json"


def export(workdir: str, output: str | None = None) -> pathlib.Path:
    """Write the best state of `workdir` as `output`/model.stablehlo and model.json (default `workdir`/export).

    If `output` ends in .safetensors it is a weights file, with a .json beside it (`weights_export.export_weights`).

    The artefact is a serialised `jax.export.Exported`, called as `call(uint8=..., float32=...)`: images of both types,
    [batch, S, S] each, any batch, either of them empty; grey levels 0-255, 255 = white = dense. It returns probability
    [batch], logit [batch] and attention [batch, h, w], the rows of `uint8` first. Normalisation is inside, resizing is
    not.

    Returns:
      The folder, or the weights file.

    Raises:
      UserError: no such run, or no best state.
    """
    if output and output.endswith(SUFFIX):
        return export_weights(workdir, output)
    network = load_trained_network(workdir, implementation="plain")  # the fused graph is tuned to CPUs
    folder = pathlib.Path(output).expanduser().absolute() if output else network.source / "export"
    folder.mkdir(parents=True, exist_ok=True)
    artefact = bytes(export_network(network).serialize())
    with replace_when_written(folder / ARTEFACT) as neighbour:
        neighbour.write_bytes(artefact)
    write_atomically(folder / DESCRIPTION, to_json(_describe(network, artefact)))
    log.info("%s: %.1f MB for %s; examples/run_exported.py runs it. %s",
             folder / ARTEFACT, len(artefact) / 1e6, " and ".join(PLATFORMS), FOOTER)  # fmt: skip
    return folder


def export_network(network: TrainedNetwork) -> jax_export.Exported:
    """Trace and lower the network for every platform of PLATFORMS, both batches symbols, the weights constants.

    StableHLO has no argument of either of two types, so there is one of each, and the rows of both are one batch.
    """
    variables = jax.device_get(network.variables)
    stride, offset = network.model.backbone.stride, network.model.backbone.offset
    copies = choose_copies(network.num_copies, stride, (network.image_size, network.image_size))

    def look(grey: jax.Array) -> dict[str, jax.Array]:
        logit, out = network.model.apply(variables, to_rgb(grey, network.normalization), train=False)
        return {"logit": logit, "attention": out["attention"][..., 0]}

    def run(*, uint8: jax.Array, float32: jax.Array) -> dict[str, jax.Array]:
        images = jnp.concatenate([uint8.astype(jnp.float32), float32])
        out = average_copies(look, normalize_images(images[..., None], network.normalization), copies, stride, offset)
        return {"probability": jax.nn.sigmoid(out["logit"])} | out

    # A symbol stands for 1 or more: one less may be 0. Together they are never empty.
    bytes_1, floats_1 = jax_export.symbolic_shape("bytes_1, floats_1", constraints=["bytes_1 + floats_1 >= 3"])
    size = network.image_size
    images = {
        "uint8": jax.ShapeDtypeStruct((bytes_1 - 1, size, size), jnp.uint8),
        "float32": jax.ShapeDtypeStruct((floats_1 - 1, size, size), jnp.float32),
    }
    return jax_export.export(jax.jit(run), platforms=PLATFORMS)(**images)


def _describe(network: TrainedNetwork, artefact: bytes) -> dict[str, Any]:
    size, backbone = network.image_size, network.model.backbone
    return {
        "remark": FOOTER,
        "sha256": hashlib.sha256(artefact).hexdigest(),
        "call": "call(uint8=images, float32=images); either may be empty, [0, S, S]; the rows of uint8 come first",
        "input": f"images uint8 and images float32, [batch, {size}, {size}], grey levels 0-255 both, white = dense; "
        "whole image, resized to a square: bilinear, antialiased when shrinking",
        "output": {
            "probability": "of cardiomegaly, not calibrated, [batch]",
            "logit": "its logit, [batch]",
            "attention": "W in [0, 1], [batch, h, w]" if network.has_attention else "constant: this network has none",
        },
        "attention_geometry": {"stride_px": backbone.stride, "offset_px": backbone.offset},
        "image_size": size,
        "normalization": f"{network.normalization}, inside the artefact",
        "num_copies": network.num_copies,
        "threshold": network.threshold,
        "threshold_origin": network.threshold_origin,
        "calibration": None if network.calibration is None else vars(network.calibration),
        "platforms": PLATFORMS,
        "trained_on_phantoms": network.is_phantom,
        "trained_on": network.meta["fingerprint"],
        "config": flatten_config(network.config),
        "checkpoint_step": network.meta["progress"]["best_step"],
        "environment": describe_environment(),
    }
