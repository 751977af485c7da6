"""Cardio-XAttentionNet: cardiomegaly on chest X-rays, learnt from image labels alone. Research only, no medical device.

python launch.py --help                                              every mode, its flags, an example of each
python launch.py --config=configs/dense121.py                        train, on ChestX-ray14 if prepared, else phantoms
python launch.py --mode=predict --workdir=runs/a --inputs=xrays/     one's own images: PNG, JPEG, TIFF, BMP, DICOM
"""

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from cxa_jax.console import command_exits, log_to_console, shorten_traceback
from cxa_jax.garbage import keeping_garbage
from cxa_jax.interruption import held_back
from cxa_jax.usage import MODES, format_help

CONFIG = config_flags.DEFINE_config_file("config", None, "Config: FILE[:VARIANT,...], see configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/NAME, named after config, variants.")
WORKDIRS = flags.DEFINE_list("workdirs", [], "Finished runs, and CSVs with id, label, score; separated by commas.")
INPUTS = flags.DEFINE_multi_string("inputs", [], "Files, folders, patterns, CSVs of paths")
WEIGHTS = flags.DEFINE_string("weights", None, "In place of --workdir: a name such as nih128, a file or a workdir.")
OUTPUT = flags.DEFINE_string("output", None, "Folder (or .safetensors); by default WORKDIR/predict, WORKDIR/export.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of process 0, given to all.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Several processes: how many.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several processes: 0 ... num_processes - 1.")
DISTRIBUTED = flags.DEFINE_enum("distributed", "off", ["off", "auto"], "auto: the three from Slurm or Open MPI.")
# What absl, ml_collections and a broken config file raise.
CONFIG_ERRORS = (
    flags.Error, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def main(argv: list[str]) -> None:
    if len(argv) > 1 and MODE.value != "predict":
        sys.exit(f"error: unexpected argument(s) {' '.join(argv[1:])}; flags look like --config=FILE")
    log_to_console()
    mode = MODES[MODE.value]
    module, function = mode.target.split(":")
    config = CONFIG.value
    default = str(pathlib.Path("runs") / (config.name if config else MODE.value))
    workdir = WORKDIR.value or (None if WEIGHTS.value and "weights" in mode.flags else default)
    given = {"config": config, "data": config and config.data, "workdir": workdir, "workdirs": WORKDIRS.value}
    given |= {"inputs": INPUTS.value + argv[1:], "output": OUTPUT.value, "weights": WEIGHTS.value}
    processes = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value == "auto", MODE.value)
    with command_exits():
        load("cxa_jax.runtime", "set_up_runtime")()
        with load("cxa_jax.distributed", "joined")(*processes):
            load(module, function)(*(given[name] for name in mode.arguments))


def load(module: str, name: str) -> Callable[..., Any]:
    """Import late, so that --help does not wait for jax, and whole: a signal in the middle would break libraries."""
    with held_back(), keeping_garbage():
        return getattr(importlib.import_module(module), name)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, or show help; turn what a wrong flag, field or config file raises into one message."""
    if {"-h", "-help", "--help", "--helpshort"} & set(argv[1:]):
        own = flags.FLAGS.get_key_flags_for_module(sys.modules["__main__"])
        print(format_help(__doc__.splitlines()[0], {flag.name: flag.help for flag in own}))
        sys.exit()
    try:
        rest = flags.FLAGS(argv)
        is_needed = "config" in MODES[MODE.value].flags
        if is_needed and (CONFIG.value is None or not CONFIG.value.name):  # a file that failed to load fails here
            sys.exit("error: --config is required, such as --config=configs/dense121.py")
        return rest
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {shorten_traceback(error)}\nSee launch.py --help, and configs/common.py for every field.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
