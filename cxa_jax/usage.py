"""What the command line can do: each mode's function and flags, a line and an example; and --help made of them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_WIDTH = 110


class Mode(NamedTuple):
    """One --mode.

    Attributes:
      target: 'module:function', imported when asked for, so that --help does not wait for jax.
      arguments: what the function is given, in order; 'data' is the config's.
      summary: what it does.
      example: a whole command.
    """

    target: str
    arguments: tuple[str, ...]
    summary: str
    example: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flags that it reads."""
        return tuple("config" if name == "data" else name for name in self.arguments)


_RUN = "python launch.py --config=configs/dense121.py"
MODES = {
    "train": Mode(
        "cxa_jax.train:train_and_evaluate",
        ("config", "workdir"),
        "train, keep the best state, test it; the same command again goes on where a cut run stopped",
        _RUN,
    ),
    "evaluate": Mode(
        "cxa_jax.outputs:evaluate",
        ("config", "workdir"),
        "test the best state of a run again",
        f"{_RUN} --mode=evaluate --workdir=runs/dense121",
    ),
    "report": Mode(
        "cxa_jax.report:write_report",
        ("workdirs", "workdir"),
        "write one page on finished runs, beside the paper",
        "python launch.py --mode=report --workdirs=runs/dense121,runs/dense121-gap,theirs.csv --workdir=runs/report",
    ),
    "predict": Mode(
        "cxa_jax.predict:predict",
        ("workdir", "inputs", "output", "weights"),
        "run a finished run, or weights that come with the repository, on your own X-rays: a table, pictures",
        "python launch.py --mode=predict --weights=nih128 --inputs=xrays/ --output=predictions",
    ),
    "prepare": Mode(
        "cxa_jax.data.preparation:prepare",
        ("data",),
        "write a data set once: ChestX-ray14, or your own labelled images (--config.data.name=image_folder)",
        f"{_RUN} --mode=prepare --config.data.manual_dir=/path/to/ChestX-ray14",
    ),
    "export": Mode(
        "cxa_jax.export:export",
        ("workdir", "output"),
        "write a finished run as one file: weights (--output=FILE.safetensors), or StableHLO that jax alone runs",
        "python launch.py --mode=export --workdir=runs/dense121 --output=mine.safetensors",
    ),
    "ablate": Mode(
        "cxa_jax.ablation:ablate",
        ("config", "workdir"),
        "compare poolings over seeds",
        "python launch.py --config=configs/ablation.py --mode=ablate",
    ),
    "benchmark": Mode(
        "cxa_jax.benchmark:benchmark",
        ("config", "workdir"),
        "measure speed and memory of a config, on noise",
        f"{_RUN} --mode=benchmark",
    ),
    "selftest": Mode(
        "cxa_jax.selftest:selftest",
        (),
        "check that this installation computes what it should",
        "python launch.py --mode=selftest",
    ),
}


def format_help(title: str, flag_helps: Mapping[str, str]) -> str:
    """Return what --help prints: every mode with its flags and an example, then the flags of no mode.

    Args:
      title: stands above.
      flag_helps: what each flag takes, by its name; a flag that a mode reads must be in it.
    """
    lines = [title, "", "usage: python launch.py --mode=MODE [flags]"]
    for name, mode in MODES.items():
        default = " (the default)" if name == "train" else ""
        lines += ["", f"--mode={name}{default}: {mode.summary}", f"    {mode.example}"]
        lines += _format_flags(mode.flags, flag_helps)
    others = sorted(set(flag_helps) - {"mode"} - {flag for mode in MODES.values() for flag in mode.flags})
    if others:
        lines += ["", "Flags of more than one mode:", *_format_flags(others, flag_helps)]
    lines += [
        "",
        "Any field of configs/common.py can be overridden: --config.train.batch_size=32. Variants of a config",
    ]
    lines += ["stand behind a colon: --config=configs/dense121.py:phantom_quick. Read on in README.md and docs/."]
    return "\n".join(lines)


def _format_flags(names: Sequence[str], flag_helps: Mapping[str, str]) -> list[str]:
    lines = []
    for name in names:
        first = f"      {'--' + name:<11}"
        text = " ".join(flag_helps[name].split())  # absl breaks what it adds to flags of several values
        lines += textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * 17)
    return lines
