"""What a training takes of a network that is trained already: the backbone, and of a weights file AMM and head too."""

import logging
from typing import Any

from ml_collections import ConfigDict

from cxa_jax.array_types import PyTree
from cxa_jax.errors import UserError
from cxa_jax.model_names import WHOLE, name_backbone
from cxa_jax.models.strides import find_last_stride
from cxa_jax.weights_file import COLLECTIONS, StoredWeights, flatten_variables, read_weights
from cxa_jax.weights_registry import digest_file, find_weights
from cxa_jax.workdir import add_younger_fields, flatten_config

log = logging.getLogger(__name__)

BACKBONE = "backbone"
# Fields of config.model that must agree for a part to mean the same; its shapes must, too.
SAME_MEANING = {
    "amm": ("pooling", "labels"),
    "gate": ("pooling",),
    "feature_norm": ("attended",),
    "classifier": ("pooling", "head", "labels", "attended"),
}


def check_same_backbone(source: str, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that a backbone fits into another network.

    Args:
      source: field and value that name where it comes from, for messages.
      found: flat config of the network that has it. A dilated network has the whole one's variables.
      config: flat config of the network that takes it.

    Raises:
      UserError: it is another backbone, or one that ends after another stage.
    """
    found = WHOLE | found
    if found["model.backbone"] != config["model.backbone"]:
        raise UserError(
            f"{source} has {found['model.backbone']}; wanted is the best state of a {config['model.backbone']}"
        )
    theirs, ours = (find_last_stride(flat["model.stride"], flat["model.stride_by"]) for flat in (found, config))
    if theirs != ours:
        raise UserError(
            f"{source} has a {name_backbone(found)}, whose stages end at stride {theirs}; "
            f"{name_backbone(config)} ends at {ours}. Give both the same config.model.stride and stride_by; "
            "dilated networks end at 32, as the whole one does"
        )


def load_starting_weights(config: ConfigDict, normalization: str, fresh: PyTree) -> PyTree:
    """Return the variables with what a weights file has for them in place of fresh ones.

    The backbone is always taken; any other part where SAME_MEANING and its shapes agree.

    Args:
      config: of the run that takes them; init.weights is a name or a file.
      normalization: of that run's input; a difference is warned of.
      fresh: {'params', 'batch_stats'} of the run.

    Raises:
      UserError: no such weights, damage, or another backbone or stride.
    """
    source = f"config.init.weights={config.init.weights}"
    path = find_weights(config.init.weights, "config.init.weights")
    if path.is_dir():
        raise UserError(f"{source} is a folder: give a weights file or a name, or the run by --config.init.run")
    stored = read_weights(path)
    theirs, ours = add_younger_fields(stored.description["config"], config), flatten_config(config)
    check_same_backbone(source, theirs, ours)
    taken, left = [], []
    variables = {name: dict(fresh[name]) for name in COLLECTIONS}
    for part in fresh["params"]:
        mould = {name: {part: fresh[name][part]} for name in COLLECTIONS if part in fresh[name]}
        if part != BACKBONE and not _means_the_same(part, theirs, ours, stored, mould):
            left.append(part)
            continue
        taken.append(part)
        for name, tree in _select(stored, part).to_tree(mould).items():
            variables[name] |= tree
    log.info(
        "from %s (SHA-256 %s): %s; fresh: %s", path, digest_file(path)[:12], ", ".join(taken), ", ".join(left) or "none"
    )
    if stored.description["normalization"] != normalization:
        log.warning("%s saw images normalised by '%s', and this run's are by '%s' (config.data.normalization)",
                    source, stored.description["normalization"], normalization)  # fmt: skip
    return variables


def _means_the_same(
    part: str, theirs: dict[str, Any], ours: dict[str, Any], stored: StoredWeights, mould: PyTree
) -> bool:
    if any(theirs[f"model.{field}"] != ours[f"model.{field}"] for field in SAME_MEANING[part]):
        return False
    shapes = {name: leaf.shape for name, leaf in flatten_variables(mould).items()}
    return shapes == {name: tensor.shape for name, tensor in _select(stored, part).tensors.items()}


def _select(stored: StoredWeights, part: str) -> StoredWeights:
    """Return the tensors of one part of the network alone."""
    own = {name: tensor for name, tensor in stored.tensors.items() if name.split("/")[1:2] == [part]}
    return stored._replace(tensors=own)
