"""Everything that Cardio-XAttentionNet does, one mode each; --mode=train is the default.

  python launch.py --config=configs/dense121.py                        train, on ChestX-ray14 if prepared, else phantoms
  python launch.py --config=configs/dense121.py --mode=benchmark       speed and memory of a config, on noise
  python launch.py --config=configs/ablation.py --mode=ablate          poolings compared over seeds
  python launch.py --config=configs/dense121.py --mode=evaluate        test the best state of a workdir again
  python launch.py --mode=report --workdirs=runs/a,runs/b,theirs.csv   one page on finished runs, in --workdir
  python launch.py --config=configs/dense121.py --mode=prepare --config.data.manual_dir=/path/to/ChestX-ray14
  python launch.py --mode=predict --workdir=runs/a --inputs=xrays/     one's own images: PNG, JPEG, TIFF, BMP, DICOM
  python launch.py --mode=export --workdir=runs/a                      one file that jax alone can run

Any field of configs/common.py can be overridden: --config.train.batch_size=32.
"""

import importlib
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from cxa_jax.console import log_to_console, shorten_traceback
from cxa_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: FILE[:VARIANT,...].", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/NAME, named after config, variants.")
WORKDIRS = flags.DEFINE_list("workdirs", [], "Finished runs, and CSV files with id, label, score, for --mode=report.")
INPUTS = flags.DEFINE_multi_string("inputs", [], "Files, folders, patterns, CSVs of paths, for --mode=predict.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for predict and export; by default WORKDIR/predict and /export.")
# What absl, ml_collections and a broken config file raise.
CONFIG_ERRORS = (
    flags.Error, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
# mode: (function, what it is given); imported when asked for, so that --help does not wait for jax.
MODES = {
    "train": ("cxa_jax.train:train_and_evaluate", ("config", "workdir")),
    "evaluate": ("cxa_jax.outputs:evaluate", ("config", "workdir")),
    "ablate": ("cxa_jax.ablation:ablate", ("config", "workdir")),
    "benchmark": ("cxa_jax.benchmark:benchmark", ("config", "workdir")),
    "report": ("cxa_jax.report:write_report", ("workdirs", "workdir")),
    "prepare": ("cxa_jax.data.preparation:prepare", ("data",)),
    "predict": ("cxa_jax.predict:predict", ("workdir", "inputs", "output")),
    "export": ("cxa_jax.export:export", ("workdir", "output")),
    "selftest": ("cxa_jax.selftest:selftest", ()),
}
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def main(argv: list[str]) -> None:
    if len(argv) > 1 and MODE.value != "predict":
        sys.exit(f"error: unexpected argument(s) {' '.join(argv[1:])}; flags look like --config=FILE")
    log_to_console()
    importlib.import_module("cxa_jax.runtime").set_up_runtime()  # here, so that --help does not wait for jax
    target, names = MODES[MODE.value]
    module, function = target.split(":")
    config = CONFIG.value
    workdir = WORKDIR.value or str(pathlib.Path("runs") / (config.name if config else MODE.value))
    given = {"config": config, "data": config and config.data, "workdir": workdir, "workdirs": WORKDIRS.value}
    given |= {"inputs": INPUTS.value + argv[1:], "output": OUTPUT.value}
    try:
        getattr(importlib.import_module(module), function)(*(given[name] for name in names))
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission, no such folder
        sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse, and turn what a wrong flag, field or config file raises into one message."""
    try:
        rest = flags.FLAGS(argv)
        needed = "config" in MODES[MODE.value][1] or "data" in MODES[MODE.value][1]
        if needed and (CONFIG.value is None or not CONFIG.value.name):  # a config file that failed to load fails here
            sys.exit("error: --config is required, such as --config=configs/dense121.py")
        return rest
    except CONFIG_ERRORS as error:
        sys.exit(f"error: {shorten_traceback(error)}\nSee launch.py --help, and configs/common.py for every field.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
