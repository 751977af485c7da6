"""Train, evaluate and prepare data for Cardio-XAttentionNet.

  python launch.py --config=configs/dense121.py                        train, on ChestX-ray14 if prepared, else phantoms
  python launch.py --config=configs/dense121.py:gap                    the GAP baseline
  python launch.py --config=configs/dense121.py:phantom_quick          minutes on a laptop
  python launch.py --config=configs/dense121.py --mode=evaluate        test the best state of a workdir again
  python launch.py --config=configs/dense121.py --mode=prepare --config.data.manual_dir=/path/to/ChestX-ray14

Any field of configs/common.py can be overridden: --config.train.batch_size=32.
"""

import importlib
import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from cxa_jax.console import log_to_console

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with variants: FILE[:VARIANT,...].", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default runs/NAME, named after config and variants."
)
# What absl, ml_collections and a broken config file raise.
CONFIG_ERRORS = (
    flags.Error, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
# mode: (function, what it is given); imported when asked for, so that --help does not wait for jax.
MODES = {
    "train": ("cxa_jax.train:train_and_evaluate", ("config", "workdir")),
    "evaluate": ("cxa_jax.outputs:evaluate", ("config", "workdir")),
    "prepare": ("cxa_jax.data.chestxray14:prepare", ("data",)),
}
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument(s) {' '.join(argv[1:])}; flags look like --config=FILE")
    log_to_console()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path("~/.cache/cxa_jax/xla").expanduser()))
    from cxa_jax.errors import UserError

    target, names = MODES[MODE.value]
    module, function = target.split(":")
    config = CONFIG.value
    given = {"config": config, "data": config.data, "workdir": WORKDIR.value or str(pathlib.Path("runs") / config.name)}
    try:
        getattr(importlib.import_module(module), function)(*(given[name] for name in names))
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no such folder
        sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, and turn what a wrong flag, field or config file raises into one message."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None or not CONFIG.value.name:  # a config file that failed to load fails here
            sys.exit("error: --config is required, such as --config=configs/dense121.py")
        return rest
    except CONFIG_ERRORS as error:
        lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
        # ml_collections quotes a config file's whole traceback: its last line is what went wrong.
        shown = lines if "Traceback" not in str(error) else [lines[0], lines[-1]]
        sys.exit("error: " + "\n  ".join(shown) + "\nSee launch.py --help, and configs/common.py for every field.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
