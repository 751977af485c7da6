"""What compare.py and gpu.py share: flags and their checks, where a record comes from, and how it is written."""

import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def file_name(text: str) -> str:
    """Check a --name; a type for argparse."""
    if text in ("", ".", "..") or pathlib.Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file: give a name, and its folder by --results")
    return text


def count(text: str) -> int:
    """Check a number of things, 1 or more; a type for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def interpreter(text: str) -> str:
    """Check that a program can be run; a type for argparse."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"there is no program {text!r}")
    return text


def new_folder(text: str) -> str:
    """Make the folder of an outcome before anything is measured; a type for argparse."""
    try:
        pathlib.Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {error.strerror}") from None
    if not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to")
    return text


def add_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the flags that both have; `rounds` is that one's default."""
    parser.add_argument("--name", required=True, type=file_name, help="of the files in benchmarks/results")
    parser.add_argument("--image_size", type=count, default=224)
    parser.add_argument("--rounds", type=count, default=rounds)
    for flag, installed in (("--python", "requirements.txt"), ("--peers_python", "benchmarks/requirements.txt")):
        parser.add_argument(flag, type=interpreter, default=sys.executable, help=f"with {installed}")
    parser.add_argument("--results", type=new_folder, default=str(HERE / "results"), help="folder of the outcome")


def find_commit() -> str:
    """Return the commit of this file, marked if files differ from it; 'unknown' outside a repository."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+changes", "--abbrev=40", "--match=no tag"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def is_not_a_place(argument: str) -> bool:
    """Return False for the flags that say where things lie on this machine, which matters to nobody else."""
    return argument.split("=")[0] not in ("--python", "--peers_python", "--results", "--caches")


def processor() -> str:
    """Return the processor's name."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_files(folder: pathlib.Path, name: str, record: str, page: str) -> None:
    """Write NAME.json and NAME.md, each all or nothing."""
    for suffix, text in ((".json", record), (".md", page)):
        temporary = folder / f".{name}{suffix}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / (name + suffix))
