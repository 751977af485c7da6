"""--mode=prepare: whichever data set a config names, written once."""

import pathlib

from ml_collections import ConfigDict

from cxa_jax.data import chest_phantom, chestxray14, image_folder
from cxa_jax.data.damage import naming_damage
from cxa_jax.data.datasets import load_dataset
from cxa_jax.data.near_duplicates import find_near_duplicates


def prepare(data_config: ConfigDict) -> None:
    """Prepare the set that config.data names ('auto': ChestX-ray14); one's own images are searched for leaks, too.

    Raises:
      UserError: as the set's own `prepare`.
    """
    with naming_damage(data_config):
        _prepare(data_config)


def _prepare(data_config: ConfigDict) -> None:
    match data_config.name:
        case "image_folder":
            image_folder.prepare(data_config)
            folder = pathlib.Path(image_folder.create_builder(data_config).data_path)
            image_folder.report_leakage(folder, find_near_duplicates(load_dataset(data_config).splits))
        case "chest_phantom":
            chest_phantom.prepare(data_config)
        case _:
            chestxray14.prepare(data_config)
