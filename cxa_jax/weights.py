"""A trained network by its name, from a weights file or a workdir; its data and a connection are not needed."""

import pathlib

from cxa_jax.calibration import Calibration
from cxa_jax.companion_files import StoredFolder
from cxa_jax.config_checks import check_config
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import read_rule
from cxa_jax.sharding import create_mesh, put_replicated
from cxa_jax.trained_network import (
    TrainedNetwork,
    build_run_config,
    create_trained_model,
    describe_looking,
    describe_variables,
    load_trained_network,
)
from cxa_jax.weights_file import read_weights
from cxa_jax.weights_registry import find_weights


def load_weights(weights: str, implementation: str = "") -> TrainedNetwork:
    """Load a trained network.

    Args:
      weights: name of one in weights/, such as 'nih128'; a file that --mode=export wrote; or a workdir.
      implementation: graph of the backbone, 'plain' or 'fused', the same function; '' takes what fits this machine.

    Raises:
      UserError: there is no such network, its file is not the one that its digest is of, or it cannot be read.
    """
    path = find_weights(str(weights))
    return load_trained_network(str(path), implementation) if path.is_dir() else load_file(path, implementation)


def load_file(path: pathlib.Path, implementation: str = "") -> TrainedNetwork:
    """Load what `weights_file.write_weights` wrote; arguments and errors as `load_weights`."""
    stored = read_weights(path)
    told = stored.description
    try:
        config = build_run_config(path, told["config"])
        model = create_trained_model(config, implementation)
        check_config(config, model.backbone.min_size)
        box_rule = read_rule(told["box_rule"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its box_rule is {told['box_rule']!r}") from error
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    mesh = create_mesh()
    variables = stored.to_tree(describe_variables(model, mesh, config.data.image_size))
    return TrainedNetwork(
        source=path,
        folder=StoredFolder(path, told["companions"]),
        config=config.lock(),
        model=model,
        mesh=mesh,
        variables=put_replicated(variables, mesh),
        meta=told,
        threshold=float(told["threshold"]),
        threshold_origin=told["threshold_origin"],
        calibration=None if told["calibration"] is None else Calibration(**told["calibration"]),
        is_phantom=told["is_phantom"],
        box_rule=box_rule,
        **describe_looking(config, model, mesh, config.eval.num_copies),
    )
