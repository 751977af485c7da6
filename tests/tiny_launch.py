"""Config file of a real run in seconds: launch.py, drawn phantoms on disk, the smallest network. Not a default."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tiny


def get_config():
    """Return 18 training steps on 24 small patients, checkpoints in between."""
    return tiny.make_config(
        **{
            "data.name": "chest_phantom",
            "data.phantom.num_patients": 24,
            "data.num_workers": 2,
            "train.checkpoint_every_steps": 2,
        }
    )
